// Streams and their work.
#pragma once
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "driver.h"

namespace softgpu {

using Work = std::function<Result()>;

// Same numbers as CUgraphNodeType.
enum class NodeType : int { Kernel = 0, Copy = 1, Set = 2, Host = 3, Free = 11 };

struct Node {
    NodeType type;
    Work work;
};

struct Stream;

// A capture in progress: the captured work of its streams.
struct Capture {
    enum Mode : int { Global = 0, ThreadLocal = 1, Relaxed = 2 };
    std::mutex lock;
    std::vector<Node> nodes;
    Mode mode;
    std::thread::id thread;
    Stream* origin;
    bool invalid = false;
    std::map<Stream*, bool> forked;  // streams that joined the capture later, and whether the origin waits for them
};

struct Stream {
    std::recursive_mutex running;  // one work item at a time
    // Lazy mode: deferred work, and the numbers of work items submitted and completed so far.
    std::deque<Work> queue;
    uint64_t submitted = 0;
    uint64_t completed = 0;
    Result error = kSuccess;  // of deferred work; returned by the next synchronisation
    std::shared_ptr<Capture> capture;
};

// Live objects by handle. A handle that is not in the table was destroyed or never existed.
template <class T> class HandleTable {
  public:
    void* add(std::shared_ptr<T> object) {
        std::lock_guard<std::mutex> guard(lock_);
        void* handle = object.get();
        objects_.emplace(handle, std::move(object));
        return handle;
    }

    std::shared_ptr<T> find(void* handle) {
        std::lock_guard<std::mutex> guard(lock_);
        auto found = objects_.find(handle);
        return found == objects_.end() ? nullptr : found->second;
    }

    bool remove(void* handle) {
        std::lock_guard<std::mutex> guard(lock_);
        return objects_.erase(handle) == 1;
    }

    std::vector<std::shared_ptr<T>> all() {
        std::lock_guard<std::mutex> guard(lock_);
        std::vector<std::shared_ptr<T>> objects;
        for (auto& entry : objects_) objects.push_back(entry.second);
        return objects;
    }

  private:
    std::mutex lock_;
    std::unordered_map<void*, std::shared_ptr<T>> objects_;
};

// Null, with a report, if there is no such stream.
std::shared_ptr<Stream> find_stream(void* handle);
std::vector<std::shared_ptr<Stream>> all_streams();

// Runs the work now, or adds it to a capture, or in lazy mode defers it until the host waits for it.
Result submit(void* stream, NodeType type, Work work);

inline bool is_lazy() { return process_options.lazy != 0; }
// Lock of all deferred work: streams may be destroyed while another thread synchronises.
std::recursive_mutex& lazy_lock();

// Run the deferred work of one stream (up to a number of submitted work items) or of all streams.
Result catch_up(Stream& stream, uint64_t up_to = UINT64_MAX);
Result catch_up_all();

// Refuses calls that a driver forbids during a capture.
Result refuse_in_capture(const char* what);
void capture_began(const Capture& capture);
void capture_ended(const Capture& capture);

}  // namespace softgpu
