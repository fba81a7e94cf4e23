//! The sources themselves: the order of the rooms, the header, the build script, and the shipped PTX.

#[cfg(feature = "cuda")]
mod fences;
mod hangs;
mod header;
mod layering;
#[path = "../../src/selftest/limit.rs"]
mod limit;
#[cfg(all(unix, feature = "cuda"))]
mod ptx;
