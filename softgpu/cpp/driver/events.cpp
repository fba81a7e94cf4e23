// Events: marks in a stream, and waits between streams.
#include <chrono>

#include "streams.h"

namespace softgpu {

namespace {

using Clock = std::chrono::steady_clock;

struct Event {
    bool keeps_time;
    bool recorded = false;
    Clock::time_point time;
    std::shared_ptr<Stream> stream;     // stream where it was recorded
    uint64_t position = 0;              // number of work items before it (lazy mode)
    std::shared_ptr<Capture> capture;   // set if recorded during a capture
};

constexpr unsigned kDisableTiming = 2;

HandleTable<Event>& events() {
    static auto* table = new HandleTable<Event>;
    return *table;
}

std::shared_ptr<Event> find_event(void* handle) {
    auto event = events().find(handle);
    if (event == nullptr) fail(kInvalidHandle, "%p is no event, or was destroyed", handle);
    return event;
}

// A stream outside a capture that waits for work of the capture becomes part of it.
void fork_into(std::shared_ptr<Capture> capture, Stream& stream) {
    std::lock_guard<std::mutex> guard(capture->lock);
    capture->forked[&stream] = false;
    stream.capture = capture;
}

Result wait_in_capture(Stream& waiting, Event& event) {
    if (event.capture == nullptr) {
        if (!event.recorded) return kSuccess;
        waiting.capture->invalid = true;
        return fail(kCaptureIsolation, "a captured stream waits for an event recorded outside the capture");
    }
    if (event.capture != waiting.capture) {
        waiting.capture->invalid = true;
        return fail(kCaptureIsolation, "a captured stream waits for an event of another capture");
    }
    // Nodes are replayed in the order in which they were captured, so there is nothing to add to the graph.
    std::lock_guard<std::mutex> guard(waiting.capture->lock);
    auto forked = waiting.capture->forked.find(event.stream.get());
    if (forked != waiting.capture->forked.end()) forked->second = true;
    return kSuccess;
}

}  // namespace

}  // namespace softgpu

using namespace softgpu;

DRIVER_API Result cuEventCreate(void** event, unsigned flags) {
    if (Result error = require_context()) return error;
    auto created = std::make_shared<Event>();
    created->keeps_time = (flags & kDisableTiming) == 0;
    *event = events().add(created);
    return kSuccess;
}

DRIVER_API Result cuEventDestroy_v2(void* event) {
    return events().remove(event) ? kSuccess : fail(kInvalidHandle, "%p is no event, or was destroyed", event);
}

DRIVER_API Result cuEventRecord(void* event_handle, void* stream_handle) {
    auto event = find_event(event_handle);
    auto stream = find_stream(stream_handle);
    if (event == nullptr || stream == nullptr) return kInvalidHandle;
    event->recorded = true;
    event->stream = stream;
    event->capture = stream->capture;
    if (stream->capture != nullptr) return kSuccess;
    const Result result = submit(stream_handle, NodeType::Host, [event] {
        event->time = Clock::now();
        return kSuccess;
    });
    event->position = stream->submitted;
    return result;
}

DRIVER_API Result cuStreamWaitEvent(void* stream_handle, void* event_handle, unsigned) {
    auto event = find_event(event_handle);
    auto stream = find_stream(stream_handle);
    if (event == nullptr || stream == nullptr) return kInvalidHandle;
    if (stream->capture != nullptr) return wait_in_capture(*stream, *event);
    if (event->capture != nullptr && event->capture == event->stream->capture) {
        fork_into(event->capture, *stream);
        return kSuccess;
    }
    if (!event->recorded || event->stream == stream || !is_lazy()) return kSuccess;
    return submit(stream_handle, NodeType::Host, [before = event->stream, position = event->position] {
        return catch_up(*before, position);
    });
}

DRIVER_API Result cuEventSynchronize(void* handle) {
    auto event = find_event(handle);
    if (event == nullptr) return kInvalidHandle;
    if (event->capture != nullptr) return fail(kCapturedEvent, "synchronisation with an event of a capture");
    count_blocking_call();
    return event->recorded ? catch_up(*event->stream, event->position) : kSuccess;
}

DRIVER_API Result cuEventQuery(void* handle) {
    auto event = find_event(handle);
    if (event == nullptr) return kInvalidHandle;
    if (event->capture != nullptr) return fail(kCapturedEvent, "query of an event of a capture");
    if (!event->recorded) return kSuccess;
    std::lock_guard<std::recursive_mutex> guard(lazy_lock());
    if (event->stream->completed >= event->position) return kSuccess;
    catch_up(*event->stream, event->stream->completed + 1);  // see cuStreamQuery
    return kNotReady;
}

DRIVER_API Result cuEventElapsedTime_v2(float* milliseconds, void* start_handle, void* end_handle) {
    auto start = find_event(start_handle);
    auto end = find_event(end_handle);
    if (start == nullptr || end == nullptr) return kInvalidHandle;
    for (auto& event : {start, end}) {
        if (!event->keeps_time) return fail(kInvalidHandle, "elapsed time of an event that was created without timing");
        if (!event->recorded) return fail(kInvalidHandle, "elapsed time of an event that was never recorded");
        std::lock_guard<std::recursive_mutex> guard(lazy_lock());
        if (event->stream->completed < event->position) return kNotReady;
    }
    *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
    return kSuccess;
}

DRIVER_API Result cuEventElapsedTime(float* milliseconds, void* start, void* end) {
    return cuEventElapsedTime_v2(milliseconds, start, end);
}
