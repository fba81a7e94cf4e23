#include "streams.h"

namespace softgpu {

static HandleTable<Stream>& streams() {
    static auto* table = new HandleTable<Stream>;  // never destroyed: threads may outlive static objects
    return *table;
}

static const std::shared_ptr<Stream>& default_stream() {
    static auto* stream = new std::shared_ptr<Stream>(std::make_shared<Stream>());
    return *stream;
}

std::recursive_mutex& lazy_lock() {
    static auto* lock = new std::recursive_mutex;
    return *lock;
}

// 0, 1 and 2 are the three handles of the default stream.
static bool is_default_handle(void* handle) { return uintptr_t(handle) <= 2; }

std::shared_ptr<Stream> find_stream(void* handle) {
    if (is_default_handle(handle)) return default_stream();
    auto stream = streams().find(handle);
    if (stream == nullptr) fail(kInvalidHandle, "%p is no stream, or was destroyed", handle);
    return stream;
}

std::vector<std::shared_ptr<Stream>> all_streams() {
    auto all = streams().all();
    all.push_back(default_stream());
    return all;
}

static Result add_to_capture(Stream& stream, NodeType type, Work work) {
    Capture& capture = *stream.capture;
    std::lock_guard<std::mutex> guard(capture.lock);
    capture.nodes.push_back({type, std::move(work)});
    // Earlier waits for this stream do not cover the new node.
    auto forked = capture.forked.find(&stream);
    if (forked != capture.forked.end()) forked->second = false;
    return kSuccess;
}

Result submit(void* handle, NodeType type, Work work) {
    auto stream = find_stream(handle);
    if (stream == nullptr) return kInvalidHandle;
    if (stream->capture != nullptr) return add_to_capture(*stream, type, std::move(work));
    if (is_lazy()) {
        std::lock_guard<std::recursive_mutex> guard(lazy_lock());
        stream->queue.push_back(std::move(work));
        stream->submitted++;
        return kSuccess;
    }
    std::lock_guard<std::recursive_mutex> guard(stream->running);
    return work();
}

static void run_next(Stream& stream) {
    Work work = std::move(stream.queue.front());
    stream.queue.pop_front();
    const Result result = work();
    stream.completed++;
    if (result != kSuccess && stream.error == kSuccess) stream.error = result;
}

Result catch_up(Stream& stream, uint64_t up_to) {
    std::lock_guard<std::recursive_mutex> guard(lazy_lock());
    while (stream.completed < up_to && !stream.queue.empty()) run_next(stream);
    const Result error = stream.error;
    stream.error = kSuccess;
    return error;
}

Result catch_up_all() {
    std::lock_guard<std::recursive_mutex> guard(lazy_lock());
    Result first_error = kSuccess;
    for (auto& stream : all_streams()) {
        if (stream->capture != nullptr) continue;
        const Result error = catch_up(*stream);
        if (first_error == kSuccess) first_error = error;
    }
    return first_error;
}

static thread_local int captures_of_thread = 0;  // without relaxed ones
static std::atomic<int> global_captures{0};

void capture_began(const Capture& capture) {
    if (capture.mode != Capture::Relaxed) captures_of_thread++;
    if (capture.mode == Capture::Global) global_captures++;
}

void capture_ended(const Capture& capture) {
    if (capture.mode != Capture::Relaxed) captures_of_thread--;
    if (capture.mode == Capture::Global) global_captures--;
}

Result refuse_in_capture(const char* what) {
    if (captures_of_thread > 0) return fail(kCaptureUnsupported, "%s while this thread captures a graph", what);
    if (global_captures > 0) return fail(kCaptureUnsupported, "%s while a capture of mode GLOBAL is going on", what);
    return kSuccess;
}

}  // namespace softgpu

using namespace softgpu;

DRIVER_API Result cuStreamCreate(void** stream, unsigned) {
    if (Result error = require_context()) return error;
    *stream = streams().add(std::make_shared<Stream>());
    return kSuccess;
}

DRIVER_API Result cuStreamCreateWithPriority(void** stream, unsigned flags, int) {
    return cuStreamCreate(stream, flags);
}

DRIVER_API Result cuStreamDestroy_v2(void* handle) {
    if (is_default_handle(handle)) return fail(kInvalidHandle, "the default stream cannot be destroyed");
    std::lock_guard<std::recursive_mutex> guard(lazy_lock());
    auto stream = find_stream(handle);
    if (stream == nullptr) return kInvalidHandle;
    catch_up(*stream);
    streams().remove(handle);
    return kSuccess;
}

DRIVER_API Result cuStreamSynchronize(void* handle) {
    auto stream = find_stream(handle);
    if (stream == nullptr) return kInvalidHandle;
    if (stream->capture != nullptr) {
        stream->capture->invalid = true;
        return fail(kCaptureUnsupported, "synchronisation of a stream that is being captured");
    }
    count_blocking_call();
    return catch_up(*stream);
}

// In lazy mode a query that answers "not ready" runs one work item, so that polling terminates.
DRIVER_API Result cuStreamQuery(void* handle) {
    auto stream = find_stream(handle);
    if (stream == nullptr) return kInvalidHandle;
    if (stream->capture != nullptr) {
        stream->capture->invalid = true;
        return fail(kCaptureUnsupported, "query of a stream that is being captured");
    }
    std::lock_guard<std::recursive_mutex> guard(lazy_lock());
    if (stream->queue.empty()) return catch_up(*stream);
    run_next(*stream);
    return kNotReady;
}

DRIVER_API Result cuCtxSynchronize() {
    if (Result error = refuse_in_capture("context synchronisation")) return error;
    count_blocking_call();
    return catch_up_all();
}

DRIVER_API Result cuLaunchHostFunc(void* stream, void (*function)(void*), void* argument) {
    return submit(stream, NodeType::Host, [=] {
        function(argument);
        return kSuccess;
    });
}

// For the cuBLASLt stand-in. Calls `drop` when nothing can run the work again.
DRIVER_API int softgpu_submit(void* stream, int (*run)(void*), void* job, void (*drop)(void*)) {
    auto owned = std::shared_ptr<void>(job, drop);
    return submit(stream, NodeType::Kernel, [=] { return Result(run(owned.get())); });
}
