"""Options of the original projects and what they are called here: hints in errors, and the tables of docs/coming-from."""

from __future__ import annotations

# project -> its option -> ours; text in backquotes is to be typed
OPTIONS = {
    "SPIN": {
        "--cfg": "`--recipe`, as `ws-convmixer-imagenet`; a YAML file of fields of a recipe works, too",
        "DATA.PATH_TO_DATA_DIR": "`--data folder:DIR`",
        "NUM_GPUS": "`torchrun --nproc-per-node N -m thriftnet train ...`",
        "DATA_LOADER.NUM_WORKERS": "`--workers`",
        "TRAIN.BATCH_SIZE": "`--batch-size`: images per step, over all GPUs",
        "TRAIN.ENABLE": "the verb `thriftnet train`",
        "TEST.ENABLE": "the verb `thriftnet evaluate`",
        "TEST.CHECKPOINT_FILE_PATH": "the MODEL of `thriftnet evaluate`",
        "TRAIN.CHECKPOINT_FILE_PATH": "`--model`, with the recipe `wfws-convmixer-imagenet`",
        "TRAIN.AUTO_RESUME": "nothing: the same command resumes",
        "TENSORBOARD.ENABLE": "`--trackers tensorboard`, the default",
        "OUTPUT_DIR": "`--output`",
        "RNG_SEED": "`--seed`",
        "CONVMIXER.CHANNEL": "`--dim`",
        "CONVMIXER.DEPTH": "`--depth`",
        "CONVMIXER.KERNEL": "`--kernel-size`",
        "CONVMIXER.PATCH_KERNEL": "`--patch-size`",
        "CONVMIXER.ACT_FUNC": "`--activation relu` or `gelu`",
        "CONVMIXER.WEIGHT_SHARE.SHARE_RATE": "`--rate`",
        "CONVMIXER.WEIGHT_SHARE.SHARING_MAPPING": "`--mapping`",
        "CONVMIXER.WEIGHT_SHARE.SHARING_DISTRIBUTION": "`--distribution`",
        "CONVMIXER.WEIGHT_SHARE.REDUCTION_FN": "`--fusion`, of the network `wfws_convmixer`",
        "SOLVER.BASE_LR": "`--lr`",
        "SOLVER.MAX_EPOCH": "`--epochs`",
        "SOLVER.WEIGHT_DECAY": "`--weight-decay`",
        "SOLVER.OPTIMIZING_METHOD": "`--optimizer`",
        "SOLVER.CLIP_GRAD_L2NORM": "`--clip-grad`",
        "MODEL.DROPOUT_RATE": "`--drop-rate`",
        "MIXUP.ALPHA": "`--mixup`",
        "MIXUP.CUTMIX_ALPHA": "`--cutmix`",
        "MIXUP.LABEL_SMOOTH_VALUE": "`--label-smoothing`",
        "AUG.AA_TYPE": "`--rand-augment`",
        "AUG.RE_PROB": "`--random-erasing`",
    },
    "soft-sharing": {
        "--dataset": "`--data cifar10:DIR`, `cifar100:DIR` or `folder:DIR`",
        "--arch": "the MODEL of a verb; `--model` for `thriftnet train`",
        "--wide": "`--width`, of the network `swrn`",
        "--bank_size": "`--templates`",
        "--learning_rate": "`--lr`",
        "--decay": "`--weight-decay`",
        "--schedule": '`--schedule multistep --milestones "{60: 0.2, 120: 0.2, 160: 0.2}"`',
        "--gammas": '`--milestones "{60: 0.2, 120: 0.2, 160: 0.2}"`: epoch and factor',
        "--cutout": "`--cutout 16`: the side of the square, 0 for none",
        "--save_path": "`--output`, the folder of one run",
        "--job-id": "`--output`, the folder of one run",
        "--resume": "nothing: the same command resumes; a file to evaluate is the MODEL of `thriftnet evaluate`",
        "--start_epoch": "nothing: the same command resumes",
        "--evaluate": "the verb: `thriftnet evaluate MODEL --data D`",
        "--ngpu": "`torchrun --nproc-per-node N -m thriftnet train ...`; `--device cpu` for none",
        "--manualSeed": "`--seed`",
        "--print_freq": "nothing: a line is printed per epoch",
    },
    "DS-Net": {
        "--config": "`--recipe ds-net-imagenet`, or a YAML file of fields of a recipe",
        "--initial-checkpoint": "`--model FILE`",
        "resume:": "`--model FILE`, with `--stage gate`; the same command resumes an interrupted training",
        "--img-size": "`--image-size`",
        "--drop": "`--drop-rate`, of the network",
        "--opt": "`--optimizer`",
        "--sched": "`--schedule`",
        "--aa": "`--rand-augment`",
        "--reprob": "`--random-erasing`",
        "--smoothing": "`--label-smoothing`",
        "--train-interpolation": "`--interpolation`",
        "--model-ema": "`--ema-decay`",
        "--model-ema-decay": "`--ema-decay`",
        "--amp": "`--precision fp16`",
        "--slim_train": "`--stage supernet`",
        "--gate-train": "`--stage gate`",
        "--inplace_bootstrap": "`--stage.options.teacher average`, the default",
        "--ensemble_ib": "`--stage.options.ensemble true`",
        "--start_chn_idx": '`--gate-choices "[0, 1, 2, 3]"`, of the network',
        "--test_mode": "the verb: `thriftnet evaluate MODEL --data D --mode all`",
        "reset_bn:": "the verb: `thriftnet recalibrate MODEL --data D --output FOLDER`",
        "--num-gpu": "`torchrun --nproc-per-node N -m thriftnet train ...`",
        "--validation-batch-size-multiplier": "nothing: the result does not depend on it",
        "--eval-metric": "`--select-on`",
        "--recovery-interval": "`--checkpoint-every`",
        "--sync-bn": "nothing: no recipe uses it",
        "--dist-bn": "nothing: the statistics of the first process are kept",
    },
    "Net_RL2": {
        "--lambdaR": "`--lambda-r`, of the network",
        "--visible_device": "the environment variable `CUDA_VISIBLE_DEVICES`, with `torchrun --nproc-per-node N -m thriftnet ...`",
        "--pretrained": "`--model FILE` in training; the MODEL of `thriftnet evaluate`",
        "--starting_epoch": "nothing: the same command resumes",
        "--dataset_path": "`--data cifar10:DIR`, `cifar100:DIR` or `folder:DIR`",
    },
    "ShiftResNet": {
        "--arch": "the MODEL of a verb; `--model` for `thriftnet train`",
        "--dataset": "`--data cifar10:DIR` or `cifar100:DIR`",
        "--datadir": "`--data cifar10:DIR` or `cifar100:DIR`",
        "--resume": "nothing: the same command resumes",
        "--suppress-errors": "nothing: give one MODEL at a time",
    },
}


def hint(option: str) -> str:
    """What an option of the original projects is here; "" for other options.

    Example:
        >>> hint("--bank-size")
        'soft-sharing has --bank_size; here it is `--templates`'
    """
    wanted = _normalized(option)
    meanings: dict[str, tuple[list[str], str]] = {}
    for project, options in OPTIONS.items():
        for theirs, ours in options.items():
            if _normalized(theirs) == wanted and not ours.startswith(f"`{theirs}"):  # another name
                meanings.setdefault(ours, ([], theirs))[0].append(project)
    return "; ".join(
        f"{' and '.join(projects)} {'has' if len(projects) == 1 else 'have'} {theirs}; here it is {ours}"
        for ours, (projects, theirs) in meanings.items()
    )


def options_table(project: str) -> str:
    """The table of a project's options for its page, in Markdown."""
    rows = (f"| `{theirs}` | {ours} |" for theirs, ours in OPTIONS[project].items())
    return "\n".join(["| theirs | here |", "|---|---|", *rows])


def _normalized(option: str) -> str:
    return option.lstrip("-").rstrip(":").replace("_", "-").lower()
