"""OpenMP's threads."""

from thinkstack.kernels.cpu.build import binary


def release_threads() -> None:
    """End the OpenMP threads that wait for the calling thread; its next parallel operation starts them again.

    libgomp's threads hardly spin at barriers while there are more of them than cores, counting those that sleep: a
    second thread with a pool of its own makes a decoding step 1.26 times as long.
    """
    library = binary()
    if library is not None and hasattr(library, "omp_pause_resource_all"):
        library.omp_pause_resource_all(1)  # omp_pause_soft
