// Parsed part of a PTX text: version, target, and the declarations of its kernels.
#pragma once
#include <string>
#include <vector>

namespace softgpu {

struct PtxKernel {
    std::string name;
    std::vector<unsigned> parameter_bytes;
    unsigned max_threads = 1024;       // .maxntid or .reqntid
    unsigned static_shared_bytes = 0;  // sum of the .shared arrays in its body
};

struct PtxModule {
    int version = 0;            // 80 for 8.0
    int target = 0;             // 80 for sm_80
    bool architecture_specific = false;  // sm_90a: runs on exactly 9.0
    std::vector<PtxKernel> kernels;
};

// False if the text is not PTX.
bool read_ptx(std::string text, PtxModule* module);

}  // namespace softgpu
