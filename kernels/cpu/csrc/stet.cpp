// The team of threads, and what Python calls. Plain C at the border: no Python header, no torch, nothing to link with.

#include <condition_variable>
#include <cstdio>  // tells whether this is glibc
#include <cstdlib>
#include <mutex>
#include <new>
#include <sched.h>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "step.h"

namespace generic {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

const Kernels* best_kernels() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni")) {
        return &avx512::kernels;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        return &avx2::kernels;
    }
#endif
    return &generic::kernels;
}

const Kernels* named_kernels(const char* name) {
    const Kernels* best = best_kernels();
    if (std::strcmp(name, best->name) == 0) return best;
    if (std::strcmp(name, generic::kernels.name) == 0) return &generic::kernels;
#if defined(__x86_64__)
    // What the processor has beside its best one.
    if (best == &avx512::kernels && std::strcmp(name, avx2::kernels.name) == 0) return &avx2::kernels;
#endif
    return nullptr;
}

// A few threads that carry out programs together with the one that calls. Between two commands they meet; between two
// programs those that wait spin for a moment and then sleep.
class Team {
  public:
    Team(int num_threads, const Kernels* kernels) : num_threads_(num_threads), kernels_(kernels) {
        try {
            for (int i = 0; i < num_threads; ++i) {
                scratch_.push_back((float*)std::aligned_alloc(64, SCRATCH_FLOATS * sizeof(float)));
                if (!scratch_.back()) throw std::bad_alloc();
            }
            for (int i = 1; i < num_threads; ++i) {
                threads_.emplace_back([this, i] { serve(i); });
            }
        } catch (...) {  // the system gives no more threads: those that run must end before they may be forgotten
            stop();
            throw;
        }
    }

    ~Team() { stop(); }

    void run(const Command* commands, int64_t count, const Step* step) {
        if (count == 0) return;  // nothing to meet after: the others might see this program only after the next one
        commands_ = commands;
        count_ = count;
        step_ = step;
        if (num_threads_ > 1) {
            program_number_.fetch_add(1, std::memory_order_seq_cst);
            if (sleeping_.load(std::memory_order_seq_cst) > 0) {
                { std::lock_guard<std::mutex> hold(lock_); }
                wake_.notify_all();
            }
        }
        carry_out(0);
    }

    const Kernels* kernels() const { return kernels_; }

  private:
    void stop() {
        {
            std::lock_guard<std::mutex> hold(lock_);
            stopping_ = true;
            program_number_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
        for (float* each : scratch_) std::free(each);
    }

    void serve(int thread) {
        uint32_t seen = 0;
        for (;;) {
            if (!await(seen)) return;
            ++seen;
            carry_out(thread);
        }
    }

    // Wait for the next program; false: there will be none.
    bool await(uint32_t seen) {
        for (int i = 0; i < 2000; ++i) {
            if (program_number_.load(std::memory_order_acquire) != seen) return !stopping_;
            relax();
        }
        std::unique_lock<std::mutex> hold(lock_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(hold, [&] { return program_number_.load(std::memory_order_seq_cst) != seen; });
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
        return !stopping_;
    }

    void carry_out(int thread) {
        // Copies: whoever called `run` may be setting up the next program while this thread leaves the last meeting.
        const Command* commands = commands_;
        const int64_t count = count_;
        const Step* step = step_;
        for (int64_t i = 0; i < count; ++i) {
            Work work{&next_[i % 2], thread, num_threads_, scratch_[thread]};
            kernels_->ops[commands[i].op](commands[i], step, work);
            meet(i);
        }
    }

    // All threads wait here for the last one, which makes the counter ready for the command after the next.
    void meet(int64_t i) {
        if (num_threads_ == 1) {
            next_[i % 2].store(0, std::memory_order_relaxed);
            return;
        }
        const uint32_t round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            next_[i % 2].store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        // The one waited for may need the very core that this thread spins on.
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
            if (spins < 1500) relax();
            else sched_yield();
        }
    }

    const int num_threads_;
    const Kernels* const kernels_;
    std::vector<std::thread> threads_;
    std::vector<float*> scratch_;

    const Command* commands_ = nullptr;
    int64_t count_ = 0;
    const Step* step_ = nullptr;

    alignas(64) std::atomic<uint32_t> program_number_{0};
    alignas(64) std::atomic<int> sleeping_{0};
    alignas(64) std::atomic<int64_t> next_[2] = {{0}, {0}};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
    std::mutex lock_;
    std::condition_variable wake_;
    bool stopping_ = false;
};

}  // namespace

extern "C" {

// Sizes of the structures that Python mirrors, so that it can see that both mean the same.
void stet_layout(int64_t* sizes) {
    sizes[0] = sizeof(Command);
    sizes[1] = sizeof(Step);
    sizes[2] = sizeof(Cache);
}

// Give every allocation from a megabyte on pages of its own. By default the limit grows with what is freed, up to 32 MB;
// the buffers that weights pass through while they are loaded then leave holes, a fifth of a small model.
void stet_return_large_memory() {
#if defined(__GLIBC__)
    mallopt(M_MMAP_THRESHOLD, 1 << 20);
#endif
}

// Keep freed memory up to 64 MB for the next allocation: a step's logits then need not be handed out by the system again.
void stet_keep_memory() {
#if defined(__GLIBC__)
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 64 << 20);
#endif
}

// Whether the processor runs these kernels: "avx512", "avx2" or "generic".
int32_t stet_runs(const char* kernels) { return named_kernels(kernels) != nullptr; }

// kernels: as `stet_runs` knows them; null: the best that the processor has. Null without memory or threads for it.
void* stet_team(int32_t num_threads, const char* kernels) {
    const Kernels* found = kernels ? named_kernels(kernels) : best_kernels();
    if (!found) return nullptr;
    try {
        return new Team(num_threads, found);
    } catch (...) {
        return nullptr;
    }
}

void stet_free(void* team) { delete (Team*)team; }

const char* stet_kernels(void* team) { return ((Team*)team)->kernels()->name; }

int32_t stet_group_of(void* team) { return ((Team*)team)->kernels()->group_of; }

void stet_run(void* team, const Command* commands, int64_t count, const Step* step) {
    ((Team*)team)->run(commands, count, step);
}

// A random integer below 2^31 for each row, from its seed, position and choice: Philox-4x32-10, as `kernels.philox` has it.
void stet_random_31_bits(const uint64_t* seeds, const uint64_t* positions, const uint64_t* choices, int64_t rows,
                         int64_t* random) {
    for (int64_t row = 0; row < rows; ++row) {
        uint32_t key[2] = {(uint32_t)seeds[row], (uint32_t)(seeds[row] >> 32)};
        uint32_t c[4] = {(uint32_t)positions[row], (uint32_t)choices[row], 0, 0};
        for (int round = 0; round < 10; ++round) {
            const uint64_t a = (uint64_t)c[0] * 0xD2511F53, b = (uint64_t)c[2] * 0xCD9E8D57;
            c[0] = (uint32_t)(b >> 32) ^ c[1] ^ key[0];
            c[1] = (uint32_t)b;
            c[2] = (uint32_t)(a >> 32) ^ c[3] ^ key[1];
            c[3] = (uint32_t)a;
            key[0] += 0x9E3779B9;
            key[1] += 0xBB67AE85;
        }
        random[row] = c[0] >> 1;
    }
}

// w [N][K] of elements of `size` bytes -> panels [N / 16][K][16], features beyond N zero.
void stet_pack(const void* w, int64_t N, int64_t K, int64_t size, void* packed) {
    const char* from = (const char*)w;
    char* to = (char*)packed;
    const int64_t panels = (N + 15) / 16;
    for (int64_t panel = 0; panel < panels; ++panel) {
        char* out = to + panel * K * 16 * size;
        for (int64_t lane = 0; lane < 16; ++lane) {
            const int64_t n = panel * 16 + lane;
            const char* row = from + n * K * size;
            char* element = out + lane * size;
            if (n >= N) {
                for (int64_t k = 0; k < K; ++k) std::memset(element + k * 16 * size, 0, size);
            } else if (size == 1) {
                for (int64_t k = 0; k < K; ++k) element[k * 16] = row[k];
            } else if (size == 2) {
                for (int64_t k = 0; k < K; ++k) ((uint16_t*)element)[k * 16] = ((const uint16_t*)row)[k];
            } else {
                for (int64_t k = 0; k < K; ++k) ((uint32_t*)element)[k * 16] = ((const uint32_t*)row)[k];
            }
        }
    }
}

// w int8 [N][K] -> [N / 16][K' / g][16][g] with g = group_of, K' = K rounded up to a multiple of g; zeros beyond N and K.
// Groups of four are stored 128 higher, as bytes without a sign: see tile.h.
void stet_pack_dot(const int8_t* w, int64_t N, int64_t K, int64_t g, int8_t* packed) {
    const int64_t panels = (N + 15) / 16, groups = (K + g - 1) / g;
    for (int64_t panel = 0; panel < panels; ++panel) {
        for (int64_t lane = 0; lane < 16; ++lane) {
            const int64_t n = panel * 16 + lane;
            int8_t* out = packed + panel * groups * 16 * g + g * lane;
            for (int64_t group = 0; group < groups; ++group, out += 16 * g) {
                for (int64_t i = 0; i < g; ++i) {
                    const int8_t value = n < N && g * group + i < K ? w[n * K + g * group + i] : 0;
                    out[i] = (int8_t)(g == 4 ? value ^ 0x80 : value);
                }
            }
        }
    }
}

// Have the system hand out these pages now, as if they had been written to. Not where the system is too old for that.
void stet_populate(void* start, int64_t num_bytes) {
#if defined(__linux__)
    constexpr int POPULATE_WRITE = 23;  // since Linux 5.14; older headers do not name it
    const uintptr_t page = 4096, first = (uintptr_t)start / page * page;
    madvise((void*)first, (uintptr_t)start + num_bytes - first, POPULATE_WRITE);
#else
    (void)start, (void)num_bytes;
#endif
}

// Ask for large pages: the tables that turn addresses into places in memory are then small enough to stay in the core.
void stet_large_pages(void* start, int64_t num_bytes) {
#if defined(__linux__)
    const uintptr_t page = 1 << 21, first = ((uintptr_t)start + page - 1) / page * page;
    const uintptr_t last = ((uintptr_t)start + num_bytes) / page * page;
    if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#else
    (void)start, (void)num_bytes;
#endif
}

}  // extern "C"
