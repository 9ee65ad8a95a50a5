// Threads for host_walk.cpp, which includes this file.

#pragma once

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

namespace {

// That this process may use; hardware_concurrency counts all there are.
int cores() {
  cpu_set_t allowed;
  return sched_getaffinity(0, sizeof(allowed), &allowed) == 0 ? CPU_COUNT(&allowed) : 1;
}

// Threads that share long work. It is cut into parts, which are drawn from a counter: a helper that comes late finds
// none left, and whoever called waits for parts alone that somebody is at. So nothing hangs on helpers, as after a fork,
// which leaves them behind. They look at tensors while the caller holds Python's lock for them, and call no Python.
class Helpers {
 public:
  // Whether part(0), ... part(count - 1) all say yes; one that throws says no.
  static bool all(size_t count, const std::function<bool(size_t)>& part) {
    const auto work = std::make_shared<Work>(part, count);
    const bool alone = count < WORTH_IT || THREADS == 0 || (calls_alone > 0 && calls_alone-- > 0);
    if (!alone) here().call(work);
    work->draw();
    const auto drawn = std::chrono::steady_clock::now();
    while (work->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
    if (!alone && std::chrono::steady_clock::now() - drawn > PATIENCE) calls_alone = ALONE;
    return work->fine.load();
  }

 private:
  // Waking somebody takes as long as looking at some 500 tensors.
  static constexpr size_t WORTH_IT = 4;
  // Where all cores are busy, a helper may be kept from the part that it is at: after such a wait it is not called for a
  // while. A part takes 40 us.
  static constexpr std::chrono::microseconds PATIENCE{300};
  static constexpr int ALONE = 100;
  static inline int calls_alone = 0;  // still to come; under Python's lock, as all calls
  static inline const int THREADS = std::clamp(cores() - 1, 0, 3);

  struct Work {
    Work(const std::function<bool(size_t)>& part, size_t count) : part(part), count(count) {}
    const std::function<bool(size_t)>& part;  // of whoever waits for all parts; not touched once they are drawn
    const size_t count;
    std::atomic<size_t> next{0}, done{0};
    std::atomic<bool> fine{true};

    void draw() {
      for (size_t i; (i = next.fetch_add(1)) < count; done.fetch_add(1, std::memory_order_release)) {
        try {
          if (fine.load(std::memory_order_relaxed) && !part(i)) fine = false;
        } catch (...) {
          fine = false;
        }
      }
    }
  };

  std::mutex mutex;
  std::condition_variable called;
  std::shared_ptr<Work> latest;

  // Never destroyed, as its threads end with the process; a forked process begins anew.
  static inline Helpers* of_process = nullptr;
  static Helpers& here() {
    if (of_process == nullptr) {
      static const int registered = pthread_atfork(nullptr, nullptr, [] { of_process = nullptr, calls_alone = 0; });
      (void)registered;
      of_process = new Helpers;
      // Signals are for the threads of the program.
      sigset_t all, before;
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);
      try {
        for (int i = 0; i < THREADS; i++) std::thread([helpers = of_process] { helpers->help(); }).detach();
      } catch (const std::exception&) {
        // No more threads or memory to be had: those that are there, or the walk alone, do all of it.
      }
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    return *of_process;
  }

  void call(const std::shared_ptr<Work>& work) {
    {
      const std::lock_guard lock(mutex);
      latest = work;
    }
    called.notify_all();
  }

  void help() {
    for (std::shared_ptr<Work> mine;;) {
      {
        std::unique_lock lock(mutex);
        called.wait(lock, [&] { return latest != mine; });
        mine = latest;
      }
      mine->draw();
    }
  }
};

}  // namespace
