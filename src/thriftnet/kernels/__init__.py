"""Fast implementations of the operations that torch lacks, and the one place where an implementation is chosen."""

from thriftnet.kernels.dispatch import Explanation as Explanation
from thriftnet.kernels.dispatch import KernelChoice as KernelChoice
from thriftnet.kernels.dispatch import explain as explain
from thriftnet.kernels.dispatch import force as force
