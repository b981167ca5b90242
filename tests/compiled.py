"Whoever imports this has the C library, compiled at most once for all tests: those with a cache of their own would compile it again."
from nativebit.kernels.cpu import found

found()
