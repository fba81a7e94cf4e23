// Start of the emulator in a process: by softgpu::install, or at cuInit.
#pragma once
#include "driver.h"

namespace softgpu {

// Loads the kernels at cuInit, in a process whose loader found this library without softgpu::install (see softgpu::lend).
Result start_alone();

// Reads the options from the environment.
void read_environment();

// Adds a line to the file that SOFTGPU_REPORT names, if there is one.
void write_report(const char* line);

}  // namespace softgpu
