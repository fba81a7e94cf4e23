// cp.async: copies to shared memory that are in flight until their thread waits for them.
#pragma once
#include <stdint.h>

namespace softgpu {

// Copies `source_bytes` and fills up to `bytes` (4, 8 or 16) with zeros. The destination holds NaN until the thread waits for
// the copy. So a read that is too early shows, and so does a copy over data that another thread still reads.
void cp_async(void* shared_destination, const void* global_source, int bytes, int source_bytes);
void cp_async_commit_group();
// Lands all committed groups of this thread except the last `pending_groups`.
void cp_async_wait_group(int pending_groups);
// Lands all copies of this thread, committed or not.
void cp_async_wait_all();

}  // namespace softgpu
