#include "pool.h"

#include <immintrin.h>
#include <sched.h>
#include <signal.h>

#include <stdexcept>
#include <system_error>

namespace hb {

namespace {

constexpr int SPINS = 20000;         // some 50 microseconds, then a worker sleeps
constexpr int BARRIER_SPINS = 4000;  // then the processor is offered to somebody else

// While it lives, this thread takes no signals, nor do threads that it starts.
class Unsignalled {
public:
    Unsignalled() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~Unsignalled() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

private:
    sigset_t before_;
};

}  // namespace

Pool::Turn::Turn(std::atomic<pid_t>& owner) : owner_(owner) {
    const pid_t self = getpid();
    pid_t found = 0;
    while (!owner_.compare_exchange_strong(found, self, std::memory_order_acquire)) {
        if (found == self) {
            owner_.wait(self, std::memory_order_relaxed);
            found = 0;
        }
    }
}

Pool::Turn::~Turn() {
    owner_.store(0, std::memory_order_release);
    owner_.notify_one();
}

Pool::Pool(int threads) : threads_(threads < 1 ? 1 : threads) {}

Pool::~Pool() { stop(); }

void Pool::start() {
    if (shared_ != nullptr && owner_ == getpid()) return;
    owner_ = getpid();
    shared_ = new Shared;
    try {
        for (int thread = 1; thread < threads_; ++thread)
            add([shared = shared_, thread] { work(shared, thread); });
    } catch (const std::system_error&) {
        stop();
        throw std::runtime_error("the system gives no more threads to this process");
    }
}

// Signals are for the caller's thread.
void Pool::add(std::function<void()> work) {
    const Unsignalled unsignalled;
    shared_->workers.emplace_back(std::move(work));
}

void Pool::stop() {
    if (shared_ == nullptr || owner_ != getpid()) return;
    shared_->ending = true;
    shared_->round.fetch_add(1);
    shared_->round.notify_all();
    for (auto& worker : shared_->workers) worker.join();
    delete shared_;
    shared_ = nullptr;
}

void Pool::run(const std::function<void(int)>& job) {
    if (threads_ == 1) return job(0);
    const Turn turn(turn_);
    start();
    Shared& s = *shared_;
    s.job = &job;
    s.done.store(0, std::memory_order_relaxed);
    s.round.fetch_add(1, std::memory_order_release);
    s.round.notify_all();
    job(0);
    for (int spins = 0; s.done.load(std::memory_order_acquire) != uint32_t(threads_ - 1); ++spins)
        spins < BARRIER_SPINS ? _mm_pause() : static_cast<void>(sched_yield());
}

void Pool::beside(std::function<void(const Ending&)> job) {
    const Turn turn(turn_);
    start();
    add([shared = shared_, job = std::move(job)] { job([shared] { return shared->ending.load(); }); });
}

void Pool::barrier() {
    if (threads_ == 1) return;
    Shared& s = *shared_;
    const uint32_t phase = s.phase.load(std::memory_order_acquire);
    if (s.waiting.fetch_add(1, std::memory_order_acq_rel) == uint32_t(threads_ - 1)) {
        s.waiting.store(0, std::memory_order_relaxed);
        s.phase.store(phase + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; s.phase.load(std::memory_order_acquire) == phase; ++spins)
        spins < BARRIER_SPINS ? _mm_pause() : static_cast<void>(sched_yield());
}

void Pool::work(Shared* shared, int thread) {
    Shared& s = *shared;
    uint32_t seen = 0;
    while (true) {
        int spins = 0;
        while (s.round.load(std::memory_order_acquire) == seen) {
            if (++spins < SPINS) {
                _mm_pause();
            } else {
                s.round.wait(seen, std::memory_order_acquire);
            }
        }
        ++seen;
        if (s.ending) return;
        (*s.job)(thread);
        s.done.fetch_add(1, std::memory_order_release);
    }
}

}  // namespace hb
