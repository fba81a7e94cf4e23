//! A CUDA device in software, for tests.
