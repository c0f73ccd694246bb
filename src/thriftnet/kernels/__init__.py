"""Fast forms of the operations that torch lacks, and the one place where a form is chosen."""

from thriftnet.kernels.dispatch import Choice as Choice
from thriftnet.kernels.dispatch import Explanation as Explanation
from thriftnet.kernels.dispatch import explain as explain
from thriftnet.kernels.dispatch import force as force
