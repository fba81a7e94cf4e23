// cp.async: each thread has a list of copies in flight. A copy lands when the thread waits for its group.
#include "../include/softgpu/async_copy.h"

#include <cstring>

#include "state.h"

namespace softgpu {

static AsyncCopies& copies_of_current() {
    RunnerState& state = *runner_state;
    return state.async_copies[size_t(state.block.current - state.block.fibers)];
}

static bool is_aligned(const void* address, int bytes) { return uintptr_t(address) % unsigned(bytes) == 0; }

static void check(const RunnerState& state, const void* destination, const void* source, int bytes, int source_bytes) {
    if (source_bytes < 0 || source_bytes > bytes) {
        kernel_error("cp.async of %d bytes with a source of %d bytes", bytes, source_bytes);
    }
    if (!is_aligned(destination, bytes) || !is_aligned(source, bytes)) {
        stop_kernel(Problem::Misaligned, "cp.async of %d bytes from %p to %p: misaligned", bytes, source, destination);
    }
    if (!state.shared.contains(destination, size_t(bytes))) {
        kernel_error("cp.async to %p, which is not shared memory", destination);
    }
}

static void read_source(AsyncCopy& copy) {
    memset(copy.data, 0, sizeof copy.data);
    memcpy(copy.data, copy.source, copy.source_bytes);
    copy.is_read = true;
}

void cp_async(void* destination, const void* source, int bytes, int source_bytes) {
    RunnerState& state = *runner_state;
    check(state, destination, source, bytes, source_bytes);
    AsyncCopies& copies = copies_of_current();
    const unsigned group = copies.open_group;
    copies.pending.push_back({destination, source, uint8_t(bytes), uint8_t(source_bytes), false, group, {}});
    // A GPU may read the source at once or late. Without a seed it is read late.
    if (state.seed != 0 && (state.random() & 1)) read_source(copies.pending.back());
    if (state.poison) memset(destination, 0xff, size_t(bytes));
}

void cp_async_commit_group() { copies_of_current().open_group++; }

static void land(AsyncCopy& copy) {
    if (!copy.is_read) read_source(copy);
    memcpy(copy.destination, copy.data, copy.bytes);
}

// Copies are sorted by group.
static void land_groups_before(AsyncCopies& copies, unsigned end_group) {
    size_t landed = 0;
    while (landed < copies.pending.size() && copies.pending[landed].group < end_group) land(copies.pending[landed++]);
    copies.pending.erase(copies.pending.begin(), copies.pending.begin() + ptrdiff_t(landed));
}

void cp_async_wait_group(int pending_groups) {
    AsyncCopies& copies = copies_of_current();
    if (copies.open_group > unsigned(pending_groups)) {
        land_groups_before(copies, copies.open_group - unsigned(pending_groups));
    }
}

void cp_async_wait_all() {
    cp_async_commit_group();
    cp_async_wait_group(0);
}

}  // namespace softgpu
