// Stream capture and graphs. A graph is a list of nodes, replayed in the order in which they were captured.
#include <algorithm>

#include "streams.h"

namespace softgpu {

namespace {

struct Graph {
    std::vector<Node> nodes;
};

HandleTable<Graph>& graphs() {
    static auto* table = new HandleTable<Graph>;
    return *table;
}

std::shared_ptr<Graph> find_graph(void* handle) {
    auto graph = graphs().find(handle);
    if (graph == nullptr) fail(kInvalidHandle, "%p is no graph, or was destroyed", handle);
    return graph;
}

Result run_nodes(const Graph& graph) {
    for (const Node& node : graph.nodes) {
        if (Result error = node.work()) return error;
    }
    return kSuccess;
}

void take_streams_out_of(const Capture& capture) {
    for (auto& stream : all_streams()) {
        if (stream->capture.get() == &capture) stream->capture.reset();
    }
}

bool every_fork_is_joined(const Capture& capture) {
    return std::all_of(capture.forked.begin(), capture.forked.end(), [](auto& fork) { return fork.second; });
}

}  // namespace

}  // namespace softgpu

using namespace softgpu;

DRIVER_API Result cuStreamBeginCapture_v2(void* handle, int mode) {
    if (uintptr_t(handle) <= 1) return fail(kCaptureUnsupported, "the legacy default stream cannot be captured");
    auto stream = find_stream(handle);
    if (stream == nullptr) return kInvalidHandle;
    if (stream->capture != nullptr) return fail(kIllegalState, "begin_capture on a stream that is being captured");
    auto capture = std::make_shared<Capture>();
    capture->mode = Capture::Mode(mode);
    capture->thread = std::this_thread::get_id();
    capture->origin = stream.get();
    capture_began(*capture);
    stream->capture = std::move(capture);
    return kSuccess;
}

DRIVER_API Result cuStreamEndCapture(void* handle, void** out) {
    *out = nullptr;
    auto stream = find_stream(handle);
    if (stream == nullptr) return kInvalidHandle;
    const auto capture = stream->capture;
    if (capture == nullptr) return fail(kIllegalState, "end_capture on a stream that is not being captured");
    if (capture->origin != stream.get()) {
        return fail(kCaptureUnmatched, "end_capture on a stream that did not begin the capture");
    }
    if (capture->mode != Capture::Relaxed && capture->thread != std::this_thread::get_id()) {
        return fail(kCaptureWrongThread, "end_capture on another thread than begin_capture");
    }
    take_streams_out_of(*capture);
    capture_ended(*capture);
    if (capture->invalid) return fail(kCaptureInvalidated, "the capture was invalidated by an earlier error");
    if (!every_fork_is_joined(*capture)) {
        return fail(kCaptureUnjoined, "a stream that was forked from the capture was not joined again");
    }
    auto graph = std::make_shared<Graph>();
    graph->nodes = std::move(capture->nodes);
    *out = graphs().add(graph);
    return kSuccess;
}

DRIVER_API Result cuStreamIsCapturing(void* handle, int* status) {
    auto stream = find_stream(handle);
    if (stream == nullptr) return kInvalidHandle;
    const auto& capture = stream->capture;
    *status = capture == nullptr ? 0 : capture->invalid ? 2 : 1;
    return kSuccess;
}

// Without an array: returns the number of nodes. With one: fills it with as many nodes as fit.
DRIVER_API Result cuGraphGetNodes(void* handle, void** nodes, size_t* count) {
    auto graph = find_graph(handle);
    if (graph == nullptr) return kInvalidHandle;
    if (nodes != nullptr) {
        for (size_t i = 0; i < *count; i++) nodes[i] = i < graph->nodes.size() ? &graph->nodes[i] : nullptr;
    }
    *count = nodes == nullptr ? graph->nodes.size() : std::min(*count, graph->nodes.size());
    return kSuccess;
}

DRIVER_API Result cuGraphNodeGetType(void* node, int* type) {
    *type = int(static_cast<const Node*>(node)->type);
    return kSuccess;
}

DRIVER_API Result cuGraphInstantiateWithFlags(void** executable, void* handle, unsigned long long) {
    auto graph = find_graph(handle);
    if (graph == nullptr) return kInvalidHandle;
    *executable = graphs().add(std::make_shared<Graph>(*graph));
    return kSuccess;
}

DRIVER_API Result cuGraphUpload(void* executable, void*) { return find_graph(executable) ? kSuccess : kInvalidHandle; }

DRIVER_API Result cuGraphLaunch(void* executable, void* stream) {
    auto graph = find_graph(executable);
    if (graph == nullptr) return kInvalidHandle;
    return submit(stream, NodeType::Kernel, [graph] { return run_nodes(*graph); });
}

static Result destroy_graph(void* handle) {
    return graphs().remove(handle) ? kSuccess : fail(kInvalidHandle, "%p is no graph, or was destroyed", handle);
}

DRIVER_API Result cuGraphDestroy(void* graph) { return destroy_graph(graph); }
DRIVER_API Result cuGraphExecDestroy(void* executable) { return destroy_graph(executable); }
