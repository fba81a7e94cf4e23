// Turns an invalid memory access of a kernel into an error of the launch instead of the end of the process.
#pragma once

namespace softgpu {

void install_fault_handlers();

}  // namespace softgpu
