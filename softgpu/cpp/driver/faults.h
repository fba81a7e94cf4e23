// A kernel that touches memory it may not: an error of the launch, not the end of the process.
#pragma once

namespace softgpu {

void install_fault_handlers();

}  // namespace softgpu
