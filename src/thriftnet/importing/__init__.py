"""The authors' checkpoint layouts: which of their tensors is which of ours."""
