#include "ptx.h"

#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <sstream>

namespace softgpu {

static constexpr size_t kNone = std::string::npos;

// Comments may contain any text, also names of kernels.
static void blank_comments(std::string& text) {
    for (size_t at = 0; (at = text.find("//", at)) != kNone;) {
        while (at < text.size() && text[at] != '\n') text[at++] = ' ';
    }
}

// Returns the size in bits at the end of a type such as .b8 or .u64; 0 if the word is no type.
static unsigned type_bits(const std::string& word) {
    static const std::string kKinds = "bufs";
    if (word.size() < 3 || word[0] != '.' || kKinds.find(word[1]) == kNone || !isdigit(word[2])) return 0;
    return unsigned(atoi(word.c_str() + 2));
}

// Returns the bytes of a declaration such as "u64 name" or "align 8 .b8 name[112]", each word with its dot.
static unsigned declared_bytes(const std::string& declaration) {
    std::istringstream words(declaration);
    unsigned bits = 0;
    for (std::string word; words >> word;) {
        if (bits == 0) bits = type_bits(word);
    }
    const size_t bracket = declaration.find('[');
    const unsigned count = bracket == kNone ? 1 : unsigned(atoi(declaration.c_str() + bracket + 1));
    return bits / 8 * count;
}

static void read_parameters(const std::string& text, size_t begin, size_t end, PtxKernel* kernel) {
    for (size_t at = text.find(".param", begin); at < end; at = text.find(".param", at + 1)) {
        const size_t stop = text.find_first_of(",)", at);
        kernel->parameter_bytes.push_back(declared_bytes(text.substr(at + 6, stop - at - 6)));
    }
}

// Directives between the parameters and the body.
static void read_directives(const std::string& text, size_t begin, size_t end, PtxKernel* kernel) {
    for (const char* directive : {".maxntid", ".reqntid"}) {
        const size_t at = text.find(directive, begin);
        if (at >= end) continue;
        unsigned x = 1, y = 1, z = 1;
        sscanf(text.c_str() + at + 8, " %u , %u , %u", &x, &y, &z);
        kernel->max_threads = x * y * z;
    }
}

static void read_shared_arrays(const std::string& text, size_t begin, size_t end, PtxKernel* kernel) {
    for (size_t at = text.find(".shared", begin); at < end; at = text.find(".shared", at + 1)) {
        // A declaration. In an instruction such as ld.shared.f32, a dot or a letter is adjacent to the word.
        if (!isspace(text[at + 7]) || !isspace(text[at - 1])) continue;
        const size_t stop = text.find(';', at);
        kernel->static_shared_bytes += declared_bytes(text.substr(at + 7, stop - at - 7));
    }
}

static PtxKernel read_kernel(const std::string& text, size_t entry, size_t* end) {
    PtxKernel kernel;
    const size_t name = text.find_first_not_of(" \t", entry + 6);
    const size_t name_end = text.find_first_of(" \t\r\n(", name);
    kernel.name = text.substr(name, name_end - name);
    const size_t body = text.find('{', name_end);
    const size_t open = text.find('(', name_end);
    size_t head = name_end;
    if (open < body) {
        head = text.find(')', open);
        read_parameters(text, open, head, &kernel);
    }
    read_directives(text, head, body, &kernel);
    *end = text.find("\n}", body);
    read_shared_arrays(text, body, *end, &kernel);
    return kernel;
}

bool read_ptx(std::string text, PtxModule* module) {
    blank_comments(text);
    const size_t version = text.find(".version ");
    const size_t target = text.find(".target sm_");
    if (version == kNone || target == kNone) return false;
    int major = 0, minor = 0;
    sscanf(text.c_str() + version + 9, "%d.%d", &major, &minor);
    module->version = major * 10 + minor;
    char* behind_number;
    module->target = int(strtol(text.c_str() + target + 11, &behind_number, 10));
    module->architecture_specific = *behind_number == 'a';
    for (size_t at = 0; (at = text.find(".entry", at)) != kNone;) module->kernels.push_back(read_kernel(text, at, &at));
    return true;
}

}  // namespace softgpu
