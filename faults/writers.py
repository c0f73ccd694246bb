"""Figure 5: two processes save to one folder while another reads it; nobody ever sees a mixture."""

from __future__ import annotations

from pathlib import Path

import thriftnet as tn
from faults.figure import Figure, Length, bits, ended_already, forked, names_in
from saver import network
from thriftnet.errors import CheckpointError
from thriftnet.store.config import FILES
from thriftnet.store.model_file import read_config


def measure(folder: Path, seed: int, length: Length) -> Figure:
    figure = Figure("Two processes save to one folder, one reads", ["saves", "reads", "networks seen", "mixtures"])
    saves, reads = length.pick((10, 15), (200, 400), (200, 400))
    _race(figure, folder / "race", saves, reads)
    return figure


def _race(figure: Figure, folder: Path, saves: int, reads: int) -> None:
    """Both writers save by turns two networks each, at least as often as asked and until enough was read; the reader reads as long."""
    values = (1.0, 2.0, 3.0, 4.0)
    networks = {value: network(value) for value in values}
    whole = {value: bits(model) for value, model in networks.items()}
    folder.mkdir()
    place, stop = folder / "m", folder.parent / f"{folder.name}-stop"
    tn.save(networks[1.0], place, metadata={"value": 1.0})

    def write(own: tuple[float, float], record: Path) -> None:
        count = 0
        while count < saves // 2 or not stop.exists():
            value = own[count % 2]
            tn.save(networks[value], place, metadata={"value": value})
            count += 1
        record.write_text(str(count))

    records = [folder.parent / f"{folder.name}-saves{index}" for index in range(2)]
    writers = [
        forked(lambda own=own, record=record: write(own, record)) for own, record in zip((values[:2], values[2:]), records)
    ]  # type: ignore[misc]
    seen: set[float | None] = set()
    mixtures = count = 0
    codes: dict[int, int] = {}
    while len(codes) < len(writers):
        codes |= {writer: code for writer in writers if writer not in codes and (code := ended_already(writer)) is not None}
        count += 1
        if (count >= reads and len(seen) > 1) or count >= 100 * reads:
            stop.touch()
        try:
            found = bits(tn.load(place))
        except CheckpointError as error:
            figure.expect(False, f"reading: {error}")
            continue
        value = next((value for value in values if whole[value] == found), None)
        mixtures += value is None
        seen.add(value)
    figure.expect([*codes.values()] == [0, 0], f"a writer failed: {codes}")
    figure.expect(not mixtures, f"{mixtures} of {count} reads gave tensors of two networks")
    figure.expect(len(seen) > 1, "the reader saw no change, so this shows nothing")
    last = read_config(place)["metadata"]["value"]
    figure.expect(whole[last] == bits(tn.load(place)), "config and weights are of two networks in the end")
    figure.expect(names_in(place) == sorted(FILES), f"{names_in(place)} are there in the end")
    figure.rows.append([sum(int(record.read_text()) for record in records if record.exists()), count, len(seen), mixtures])
