//! Number crunching: quantised blocks, SIMD kernels with their scalar twins, and the thread pool.
