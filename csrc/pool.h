// A small thread pool: every thread runs the same job, and the job synchronises with barriers.
//
// The caller is thread 0. Between jobs the others spin for a moment and then sleep. Several callers
// take turns. After a fork the child has no threads; it starts its own at the next job.
#pragma once

#include <unistd.h>

#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace hb {

class Pool {
public:
    explicit Pool(int threads);
    ~Pool();
    int threads() const { return threads_; }

    // Runs job(thread) on every thread; returns when all are done. Throws where the system gives no
    // thread; the next call tries again.
    void run(const std::function<void(int)>& job);

    // All threads of the running job meet here.
    void barrier();

    // Runs a job once on a thread of its own, while others run; `ending()` tells it to return.
    using Ending = std::function<bool()>;
    void beside(std::function<void(const Ending& ending)> job);

private:
    // What the threads share. It is leaked in a forked child, whose threads are not there.
    struct Shared {
        std::atomic<uint32_t> round{0}, done{0}, waiting{0}, phase{0};
        std::atomic<bool> ending{false};
        const std::function<void(int)>* job = nullptr;
        std::vector<std::thread> workers;
    };
    // The turn of a caller. It is kept by a process: one that a fork left taken is the child's.
    class Turn {
    public:
        explicit Turn(std::atomic<pid_t>& owner);
        ~Turn();

    private:
        std::atomic<pid_t>& owner_;
    };
    void start();
    void stop();
    void add(std::function<void()> work);
    static void work(Shared* shared, int thread);

    int threads_;
    std::atomic<pid_t> turn_{0};  // of which process a caller has it
    pid_t owner_ = 0;
    Shared* shared_ = nullptr;
};

}  // namespace hb
