// CUDA graphs for lacuna: libtorch's own class behind C functions, in a library of its own that is opened at run time; and what else of
// libtorch's CUDA half has no C function.
//
// It is compiled on any machine against libtorch's headers and the CUDA runtime's (scripts/build-cuda.sh); what it calls is found in
// libtorch_cuda.so, which must be open already. No exception leaves it: a function answers 0 or null for a failure, and
// lacuna_graphs_error() then says which. src/model/graphs.rs is the one caller, and says why things are done in this order.

#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <exception>
#include <memory>
#include <mutex>
#include <string>

namespace {

thread_local std::string reason;

// Captures of several models exclude each other: they may have been given the same stream.
std::mutex capturing;

struct Recorder {
  explicit Recorder(c10::DeviceIndex device)
      : device(device),
        side(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device)),
        before(c10::cuda::getCurrentCUDAStream(device)),
        pool(at::cuda::graph_pool_handle()) {}

  const c10::DeviceIndex device;
  // Where work is recorded: the default stream cannot be.
  const c10::cuda::CUDAStream side;
  // The calling thread's own stream and device, while it is on the others.
  c10::cuda::CUDAStream before;
  c10::DeviceIndex device_before = 0;
  // Memory of all graphs of this recorder.
  const c10::MempoolId_t pool;
};

template <typename Work>
auto guarded(Work work) noexcept -> decltype(work()) {
  try {
    reason.clear();
    return work();
  } catch (const c10::Error& error) {
    reason = error.what_without_backtrace();
  } catch (const std::exception& error) {
    reason = error.what();
  } catch (...) {
    reason = "an unknown exception";
  }
  if (reason.empty()) reason = "an exception without a text";
  return {};
}

} // namespace

extern "C" {

// Of this interface: whoever opens the library compares it with the one that he was written for.
int lacuna_graphs_version() noexcept { return 2; }

// Gives memory that tensors had back to the devices, where the allocator would keep it for later ones.
int lacuna_graphs_give_back() noexcept {
  return guarded([&] {
    // The allocator refuses while anything is recorded. Whoever records does not call this.
    const std::lock_guard<std::mutex> lock(capturing);
    c10::cuda::CUDACachingAllocator::emptyCache();
    return 1;
  });
}

// Why this thread's last call failed. The text stays until its next call.
const char* lacuna_graphs_error() noexcept { return reason.c_str(); }

void* lacuna_graphs_new(int device) noexcept {
  return guarded([&]() -> void* {
    c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
    return new Recorder(static_cast<c10::DeviceIndex>(device));
  });
}

// After all of its graphs.
void lacuna_graphs_free(void* recorder) noexcept {
  guarded([&] { delete static_cast<Recorder*>(recorder); return 1; });
}

// Puts the thread on the recorder's device and side stream, with everything done that was sent to the device before: captures begin and end
// on the current stream of the current device. Until lacuna_graphs_leave no other thread enters.
int lacuna_graphs_enter(void* pointer) noexcept {
  auto* recorder = static_cast<Recorder*>(pointer);
  return guarded([&] {
    std::unique_lock<std::mutex> lock(capturing);
    {
      c10::cuda::CUDAGuard guard(recorder->device);
      c10::cuda::device_synchronize();
    }
    recorder->device_before = c10::cuda::current_device();
    recorder->before = c10::cuda::getCurrentCUDAStream(recorder->device);
    c10::cuda::set_device(recorder->device);
    // From here on nothing fails: the thread is on both or on neither.
    c10::cuda::setCurrentCUDAStream(recorder->side);
    lock.release();
    return 1;
  });
}

// Back to its own stream, with everything done that was sent to the side stream. The thread is back even where this fails.
int lacuna_graphs_leave(void* pointer) noexcept {
  auto* recorder = static_cast<Recorder*>(pointer);
  const int done = guarded([&] { c10::cuda::device_synchronize(); return 1; });
  const std::string why = reason;
  const int back = guarded([&] {
    c10::cuda::setCurrentCUDAStream(recorder->before);
    c10::cuda::set_device(recorder->device_before);
    return 1;
  });
  capturing.unlock();
  if (!done) reason = why;
  return done && back;
}

// From here on what the thread sends to the side stream is noted and not done. Only this thread is held to what may be done during a
// capture: others load models and ask for memory.
void* lacuna_graphs_begin(void* pointer) noexcept {
  auto* recorder = static_cast<Recorder*>(pointer);
  return guarded([&]() -> void* {
    auto graph = std::make_unique<at::cuda::CUDAGraph>();
    graph->capture_begin(recorder->pool, cudaStreamCaptureModeThreadLocal);
    return graph.release();
  });
}

int lacuna_graphs_end(void* graph) noexcept {
  return guarded([&] { static_cast<at::cuda::CUDAGraph*>(graph)->capture_end(); return 1; });
}

// On the thread's current stream.
int lacuna_graphs_replay(void* graph) noexcept {
  return guarded([&] { static_cast<at::cuda::CUDAGraph*>(graph)->replay(); return 1; });
}

void lacuna_graphs_drop(void* graph) noexcept {
  guarded([&] { delete static_cast<at::cuda::CUDAGraph*>(graph); return 1; });
}

} // extern "C"
