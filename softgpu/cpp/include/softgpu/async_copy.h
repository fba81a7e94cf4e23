// cp.async: copies to shared memory that are in flight until their thread waits for them.
#pragma once
#include <stdint.h>

namespace softgpu {

// Copies `source_bytes` and fills up to `bytes` (4, 8 or 16) with zeros. Until it is waited for, the destination holds
// NaN: reading it too early shows, and so does issuing a copy over data that another thread still reads.
void cp_async(void* shared_destination, const void* global_source, int bytes, int source_bytes);
void cp_async_commit_group();
// Lands all committed groups of this thread but the last `pending_groups`.
void cp_async_wait_group(int pending_groups);
// Lands everything, committed or not.
void cp_async_wait_all();

}  // namespace softgpu
