// How the device of a process begins: by softgpu::install, or by itself.
#pragma once
#include "driver.h"

namespace softgpu {

// For cuInit: a process whose loader found this library without softgpu::install, as one that softgpu::lend was for, gets
// its kernels here.
Result start_alone();

// Options that the environment sets.
void read_environment();

// Adds a line to the file that SOFTGPU_REPORT names, if there is one.
void write_report(const char* line);

}  // namespace softgpu
