// The functions of nativebit/kernels/lut_device.cuh on a CPU: a lane is a fiber, which runs until it waits for others. Slow, exact, and it checks addresses.
// The name of a compiled library doesn't know this file: after a change here, delete ~/.cache/nativebit/kernels.
#pragma once
#include <ucontext.h>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <unordered_map>
#include <vector>
#define DEV inline
#define __global__ static
#define __launch_bounds__(...)
#define SHARED_BYTES(name) uint8_t* name = here->shared
#define SHARED_1024 SHARED_BYTES

struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct Dim { int x; };
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline uint32_t __float_as_uint(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
static inline float __uint_as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline void need(bool ok, const char* what) { if (!ok) { fprintf(stderr, "cuda_on_cpu: %s\n", what); abort(); } }

// where a lane is: its warp's exchange area, its block's shared memory, its cluster's blocks
struct Fiber;
struct Meeting { int of, left; std::vector<Fiber*> waiting; };
struct Warp { Meeting sync; uint32_t in[32][8]; };
struct Cluster;
struct Block { uint8_t* shared; Meeting sync, some; std::vector<Warp> warps; Cluster* cluster; int rank; };
struct Cluster { Meeting sync; std::vector<Block> blocks; };
typedef std::vector<std::function<void()>> Products;
struct Fiber { ucontext_t at; std::unique_ptr<char[]> stack; Block* block; int lane, index; Products started; std::deque<Products> groups; };   // products since the last commit; those before, group by group
static Fiber* me; static Block* here;
static Dim threadIdx, blockIdx, blockDim, gridDim;
static std::deque<Fiber*> ready;                                         // who may go on, the next one last: a warp goes as far ahead as it may, the last one first
static int running; static ucontext_t launcher;
static const uint8_t *global_from, *global_to;   // bulk copies must stay in here
static inline Warp& warp() { return here->warps[threadIdx.x/32]; }
static inline int lane_id() { return threadIdx.x%32; }
static Fiber* next_ready();
static inline void run(Fiber* f) { me = f; here = f->block; threadIdx.x = f->lane; blockIdx.x = f->index; }
static inline void give_way() {                                          // others go on; who calls this must be in a list that someone looks at
    Fiber* mine = me; Fiber* next = next_ready();
    if (next == mine) return;
    run(next); swapcontext(&mine->at, &next->at);
}
static inline void later() { ready.push_front(me); give_way(); }
static inline void wait_in(std::vector<Fiber*>& list) { list.push_back(me); give_way(); }
static inline void wake(std::vector<Fiber*>& list) { ready.insert(ready.end(), list.begin(), list.end()); list.clear(); }
static inline void wait_for_all(Meeting& m) { if (--m.left) return wait_in(m.waiting); m.left = m.of; wake(m.waiting); }
static inline void meet() { wait_for_all(warp().sync); }
static inline void __syncthreads() { wait_for_all(here->sync); }
DEV void warp_sync() { meet(); }
DEV void sync_some(int threads) {                                        // the first to come makes the barrier
    Meeting& m = here->some;
    if (!m.of) m.of = m.left = threads;
    need(m.of == threads, "a barrier of other threads than before");
    wait_for_all(m);
}

DEV uint32_t prmt(uint32_t a, uint32_t b, uint32_t s) {
    uint64_t v = (uint64_t)b << 32 | a; uint32_t d = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t n = s >> 4*i & 15, byte = v >> 8*(n & 7) & 255;
        d |= (n & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8*i;
    }
    return d;
}
DEV uint32_t least(uint32_t a, uint32_t b) { auto of = [](uint32_t a, uint32_t b) { return (uint32_t)(uint16_t)min((int16_t)a, (int16_t)b); }; return of(a, b) | of(a >> 16, b >> 16) << 16; }
DEV uint32_t most_of(uint32_t a, uint32_t b) { return (uint32_t)max(a & 0xffff, b & 0xffff) | (uint32_t)max(a >> 16, b >> 16) << 16; }
static const struct Halves { float of[1 << 16]; Halves() { for (uint32_t v = 0; v < 1 << 16; v++) { const uint16_t u = v; _Float16 h; memcpy(&h, &u, 2); of[v] = (float)h; } } } halves;   // converting takes most of the time where a CPU has no instruction for it
static inline float to_float(uint16_t v) { return halves.of[v]; }
static inline uint16_t to_half(float f) { _Float16 h = (_Float16)f; uint16_t v; memcpy(&v, &h, 2); return v; }
static inline float e4m3(uint8_t v) {
    int e = v >> 3 & 15, m = v & 7;
    float f = e ? ldexpf(8 + m, e - 10) : ldexpf(m, -9);
    return v & 128 ? -f : f;
}
#if ARCH >= 89
DEV uint32_t e4m3x2(uint32_t v) { return to_half(e4m3(v & 255)) | (uint32_t)to_half(e4m3(v >> 8 & 255)) << 16; }
DEV uint32_t e4m3x2_high(uint32_t v) { return e4m3x2(v >> 16); }
#endif
DEV uint32_t as_it_is(uint32_t v) { return v; }
DEV float half_to_float(uint32_t v) { return to_float(v & 0xffff); }
static inline float clamp_half(float f) { return f > 65504.f ? 65504.f : f < -65504.f ? -65504.f : f; }
DEV uint32_t floats_to_half2(float lo, float hi) { return to_half(clamp_half(lo)) | (uint32_t)to_half(clamp_half(hi)) << 16; }
DEV uint32_t floats_to_f16(float lo, float hi) { return to_half(lo) | (uint32_t)to_half(hi) << 16; }
DEV float fast_ratio(float a, float b) { return a/b; }
DEV float full_ratio(float a, float b) { return a/b; }
DEV float fast_exp(float v) { return expf(v); }
DEV float fast_log(float v) { return logf(v); }
DEV float inverse_sqrt(float v) { return 1.f/sqrtf(v); }
DEV uint16_t float_to_half(float v) { return to_half(v); }
DEV uint16_t float_to_bf16(float v) { uint32_t u = __float_as_uint(v); return (u + 0x7fff + (u >> 16 & 1)) >> 16; }

// fragments as PTX lays them out: lane (g, t) = (lane/4, lane%4)
DEV void mma_f16(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
    uint32_t* in = warp().in[lane_id()];
    for (int i = 0; i < 4; i++) in[i] = a[i];
    in[4] = b0; in[5] = b1;
    meet();
    auto half = [](uint32_t v, int i) { return to_float(i ? v >> 16 : v & 0xffff); };
    auto A = [&](int r, int k) { return half(warp().in[r%8*4 + k%8/2][r/8 + k/8*2], k%2); };
    auto B = [&](int k, int n) { return half(warp().in[n*4 + k%8/2][4 + k/8], k%2); };
    for (int i = 0; i < 4; i++) {
        int r = lane_id()/4 + i/2*8, n = lane_id()%4*2 + i%2;
        double sum = c[i];
        for (int k = 0; k < 16; k++) sum += (double)A(r, k)*B(k, n);
        c[i] = (float)sum;
    }
    meet();
}
DEV void mma_s8(int* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
    uint32_t* in = warp().in[lane_id()];
    for (int i = 0; i < 4; i++) in[i] = a[i];
    in[4] = b0; in[5] = b1;
    meet();
    auto byte = [](uint32_t v, int i) { return (int)(int8_t)(v >> 8*i & 255); };
    auto A = [&](int r, int k) { return byte(warp().in[r%8*4 + k%16/4][r/8 + k/16*2], k%4); };
    auto B = [&](int k, int n) { return byte(warp().in[n*4 + k%16/4][4 + k/16], k%4); };
    for (int i = 0; i < 4; i++) {
        int r = lane_id()/4 + i/2*8, n = lane_id()%4*2 + i%2;
        for (int k = 0; k < 32; k++) c[i] += A(r, k)*B(k, n);
    }
    meet();
}
DEV void load_matrices(uint32_t* d, const void* row) {
    const uint32_t at = (const uint8_t*)row - here->shared;
    need(at%16 == 0, "a row of a matrix off its 16-byte boundary");
    warp().in[lane_id()][0] = at; meet();
    for (int i = 0; i < 4; i++) memcpy(d + i, here->shared + warp().in[i*8 + lane_id()/4][0] + lane_id()%4*4, 4);
    meet();
}
DEV void store_turned(void* row, const uint32_t* v) {
    const uint32_t at = (const uint8_t*)row - here->shared;
    need(at%16 == 0, "a row of a matrix off its 16-byte boundary");
    warp().in[lane_id()][0] = at; meet();
    for (int i = 0; i < 4; i++) for (int c = 0; c < 2; c++) {            // row lane/4, columns 2(lane%4) + c of matrix i
        const uint16_t h = v[i] >> 16*c;
        memcpy(here->shared + warp().in[i*8 + lane_id()%4*2 + c][0] + lane_id()/4*2, &h, 2);
    }
    meet();
}
DEV uint32_t shfl(uint32_t v, int lane) {
    warp().in[lane_id()][0] = v; meet();
    uint32_t got = warp().in[lane][0]; meet();
    return got;
}
DEV float shfl_xor(float v, int mask) { return __uint_as_float(shfl(__float_as_uint(v), lane_id() ^ mask)); }

DEV uint4 load_x(const void* p) { need((uintptr_t)p%16 == 0, "a 16-byte load off its boundary"); return *(const uint4*)p; }
DEV uint4 load_once(const void* p) { return load_x(p); }
DEV uint16_t load_u16(const uint16_t* p) { return *p; }
DEV void fetch(const void*) {}
DEV long long load_i64(const long long* p) { return *p; }
DEV int load_int(const unsigned* p) { return (int)*p; }
DEV uint32_t add_release(unsigned* p, unsigned v) { uint32_t old = *p; *p += v; return old; }
// what blocks send each other. With -DFUZZ=seed lanes take turns in any order, one stops at times, a block may be a slow one, and what was sent arrives late and in any order,
// one half after the other, but for numbers sent to the same place, and for those that `sent_before` waits for
#ifndef FUZZ
static inline void stumble() {}
static inline void store16(uint16_t* p, uint16_t v) { *p = v; }
static inline void deliver() {}
static inline void deliver_all() {}
DEV void sent_before() {}
#else
static inline int draw(int below) { static std::minstd_rand draws(FUZZ); return draws()%below; }
struct Letter { uint16_t* to; uint16_t value; Fiber* from; int wait; };
static std::vector<Letter> mail;
static inline void stumble() {
    const bool slow = (blockIdx.x*31 + FUZZ)%3 == 0;
    if (!draw(slow ? 40 : 400)) for (int rounds = draw(slow ? 200 : 20); rounds > 0; rounds--) later();
}
static inline void store16(uint16_t* p, uint16_t v) { mail.push_back({p, v, me, draw(draw(50) ? 8 : 300)}); }
static inline void carry() {                                             // brings what has waited long enough
    std::vector<Letter> rest; std::unordered_map<uint16_t*, bool> held;
    for (auto& l : mail) if (held.count(l.to) || --l.wait > 0) { held[l.to] = true; rest.push_back(l); } else *l.to = l.value;
    mail.swap(rest);
}
static inline void deliver() { if (!mail.empty() && !draw(64)) carry(); }
static inline void deliver_all() { while (!mail.empty()) carry(); }
DEV void sent_before() { auto mine = [] { for (auto& l : mail) if (l.from == me) return true; return false; }; while (mine()) later(); }
#endif
static Fiber* next_ready() {
    deliver();
    need(!ready.empty(), "lanes that wait for each other for ever");
#ifdef FUZZ
    std::swap(ready.back(), ready[draw(ready.size())]);
#endif
    Fiber* next = ready.back(); ready.pop_back();
    return next;
}
DEV uint4 load_now(const void* p) {
    need((uintptr_t)p%16 == 0, "a 16-byte load off its boundary");
    stumble();
    uint16_t v[8]; bool not_yet = false;
    for (int i = 0; i < 8; i++) { v[i] = ((const uint16_t*)p)[i]; not_yet |= v[i] == 0x8000; }
    if (not_yet) later();
    uint4 r; memcpy(&r, v, 16); return r;
}
DEV void send(uint16_t* p, uint16_t v) { stumble(); store16(p, v); }
DEV void send(uint16_t* p, uint4 v) { need((uintptr_t)p%16 == 0, "a 16-byte store off its boundary"); uint16_t h[8]; memcpy(h, &v, 16); stumble(); for (int i = 0; i < 8; i++) store16(p + i, h[i]); }
struct Barrier { int arrivals, left; int64_t bytes; uint32_t phase; std::vector<Fiber*> waiting; };
static std::unordered_map<const void*, Barrier> barriers;
static inline void turn(Barrier& b) { if (b.left == 0 && b.bytes == 0) { b.phase ^= 1; b.left = b.arrivals; wake(b.waiting); } }
DEV void bar_init(uint64_t* bar, uint32_t arrivals) { barriers[bar] = {(int)arrivals, (int)arrivals, 0, 0, {}}; }
DEV void bar_arrive(uint64_t* bar) { Barrier& b = barriers[bar]; need(b.left > 0, "more arrivals than a barrier expects"); b.left--; turn(b); }
DEV void bar_expect(uint64_t* bar, uint32_t bytes) { Barrier& b = barriers[bar]; b.bytes += bytes; b.left--; turn(b); }
static inline void bar_bytes(uint64_t* bar, uint32_t bytes) { Barrier& b = barriers[bar]; b.bytes -= bytes; turn(b); }
DEV void bar_wait(uint64_t* bar, uint32_t phase) { while (barriers[bar].phase == (phase & 1)) wait_in(barriers[bar].waiting); }
DEV void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* bar) {
    need((uintptr_t)dst%16 == 0 && (uintptr_t)src%16 == 0 && bytes%16 == 0, "a bulk copy off its 16-byte boundary");
    need((const uint8_t*)src >= global_from && (const uint8_t*)src + bytes <= global_to, "a bulk copy from outside the matrix");
    memcpy(dst, src, bytes); bar_bytes(bar, bytes);
}
DEV void bulk_load_again(void* dst, const void* src, uint32_t bytes, uint64_t* bar) {
    need((uintptr_t)dst%16 == 0 && (uintptr_t)src%16 == 0 && bytes%16 == 0, "a bulk copy off its 16-byte boundary");
    memcpy(dst, src, bytes); bar_bytes(bar, bytes);
}
DEV void copy_piece(void* dst, const void* src, bool inside) {
    need((uintptr_t)dst%16 == 0 && (uintptr_t)src%16 == 0, "a copy off its 16-byte boundary");
    if (inside) memcpy(dst, src, 16); else memset(dst, 0, 16);
}
DEV void copy_run(void* dst, const void* src, int bytes) {
    need(bytes%16 == 0 && (const uint8_t*)src >= global_from && (const uint8_t*)src + bytes <= global_to, "a copy from outside the matrix");
    for (int i = 16*threadIdx.x; i < bytes; i += 16*blockDim.x) copy_piece((uint8_t*)dst + i, (const uint8_t*)src + i, true);
}
DEV void arrive_copied(uint64_t* bar) { bar_arrive(bar); }
DEV void copy_together(void* dst, const void* src, int bytes, uint64_t* bar) { copy_run(dst, src, bytes); arrive_copied(bar); }
// boxes of a matrix and products of a warpgroup, in the order of the 128-byte swizzle
struct Map { const uint16_t* x; int columns, rows, box_rows; };
#define MAP_PARAM const Map
static inline int make_map(Map* map, const void* x, int columns, int rows, int box_rows) { *map = {(const uint16_t*)x, columns, rows, box_rows}; return columns%8 ? -4 : 0; }
static inline int prefer_shared(const void*) { return 0; }
static inline int processors() { return 3; }
static inline int most_shared() { return ARCH < 90 ? 101376 : 232448; }   // as an RTX 4090 has, and an H100
static inline uint8_t* align_1024(uint8_t* p) { return p; }
static inline uint32_t saddr(const void* p) { return (const uint8_t*)p - here->shared; }
static inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }
DEV void fetch_map(const Map*) {}
template<class T> static inline T* in_rank(T* p, uint32_t rank) { return (T*)(here->cluster->blocks[rank].shared + ((uint8_t*)p - here->shared)); }
DEV void send4(float* p, uint64_t* bar, uint32_t rank, const float* v) { need((uintptr_t)p%16 == 0, "a 16-byte store off its boundary"); memcpy(in_rank(p, rank), v, 16); bar_bytes(in_rank(bar, rank), 16); }
DEV void box_load(void* dst, const Map* map, int column, int row, uint64_t* bar) {
    need(saddr(dst)%1024 == 0, "a box off its 1024-byte boundary");
    for (int r = 0; r < map->box_rows; r++) for (int c = 0; c < 64; c++) {
        bool inside = row + r < map->rows && column + c < map->columns;
        *(uint16_t*)(here->shared + swizzled(saddr(dst) + r*128 + c*2)) = inside ? map->x[(size_t)(row + r)*map->columns + column + c] : 0;
    }
    bar_bytes(bar, map->box_rows*128);
}
DEV void box_load_both(void* dst, const Map* map, int column, int row, uint64_t* bar) {
    need(saddr(dst)%1024 == 0 && here->cluster->blocks.size() == 2, "a box off its 1024-byte boundary, or for a block that there is not");
    for (uint32_t rank = 0; rank < 2; rank++) {
        for (int r = 0; r < map->box_rows; r++) for (int c = 0; c < 64; c++) {
            bool inside = row + r < map->rows && column + c < map->columns;
            *(uint16_t*)(here->cluster->blocks[rank].shared + swizzled(saddr(dst) + r*128 + c*2)) = inside ? map->x[(size_t)(row + r)*map->columns + column + c] : 0;
        }
        bar_bytes(in_rank(bar, rank), map->box_rows*128);
    }
}
typedef uint64_t* Remote;
DEV Remote remote(uint64_t* bars, uint32_t rank) { return in_rank(bars, rank); }
DEV void arrive(Remote bars, int i) { bar_arrive(bars + i); }
static inline int make_units_map(Map* map, const void* units, int unit, int blocks, int tiles) { *map = {(const uint16_t*)units, blocks*unit, tiles, 8}; return unit%16 ? -4 : 0; }
DEV void units_load(void* dst, const Map* map, int unit, int kb, int tile, uint64_t* bar) {
    need(saddr(dst)%128 == 0, "a box off its 128-byte boundary");
    for (int j = 0; j < map->box_rows; j++)
        if (tile + j < map->rows) memcpy((uint8_t*)dst + j*unit, (const uint8_t*)map->x + (size_t)(tile + j)*map->columns + kb*unit, unit);
        else memset((uint8_t*)dst + j*unit, 0, unit);
    bar_bytes(bar, map->box_rows*unit);
}
DEV uint32_t matrix_low(const void* p) { return saddr(p) >> 4; }
#ifdef STAMPS
DEV uint64_t now() { return std::chrono::steady_clock::now().time_since_epoch().count(); }
DEV uint32_t processor() { return 0; }
#endif
DEV uint64_t matrix_of(uint32_t low) { return low; }
DEV uint64_t matrix_at(const void* p) { return matrix_low(p); }
// Products run as late as they may, when they are waited for: registers or places that were used again too early are then wrong.
static inline void bring(const uint32_t* a) { for (int i = 0; i < 4; i++) warp().in[lane_id()][i] = a[i]; meet(); }
static inline uint32_t row_of_b(uint64_t b, int n, int byte) { return swizzled((uint32_t)(b << 4) + n/8*1024 + n%8*128 + byte); }   // rows of 128 bytes, 8 of them 1024 bytes behind the 8 before
template<int N> struct Wgmma {
    template<bool ADD = true> static void run(float* d, const uint32_t* a, uint64_t b) {
        me->started.push_back([=] {
            bring(a);
            auto A = [&](int r, int k) { uint32_t v = warp().in[r%8*4 + k%8/2][r/8 + k/8*2]; return to_float(k%2 ? v >> 16 : v & 0xffff); };
            auto B = [&](int k, int n) { return to_float(*(const uint16_t*)(here->shared + row_of_b(b, n, k*2))); };
            for (int i = 0; i < N/2; i++) {
                int r = lane_id()/4 + i%4/2*8, n = i/4*8 + lane_id()%4*2 + i%2;
                double sum = ADD ? d[i] : 0;
                for (int k = 0; k < 16; k++) sum += (double)A(r, k)*B(k, n);
                d[i] = (float)sum;
            }
            meet();
        });
    }
};
template<int N> struct WgmmaS8 {
    template<bool ADD = true> static void run(int* d, const uint32_t* a, uint64_t b) {
        need(N%8 == 0 && (N <= 32 || N%16 == 0), "a product of integers that there is not");
        me->started.push_back([=] {
            bring(a);
            auto A = [&](int r, int k) { return (int)(int8_t)(warp().in[r%8*4 + k%16/4][r/8 + k/16*2] >> k%4*8 & 255); };
            auto B = [&](int k, int n) { return (int)(int8_t)here->shared[row_of_b(b, n, k)]; };
            for (int i = 0; i < N/2; i++) {
                int r = lane_id()/4 + i%4/2*8, n = i/4*8 + lane_id()%4*2 + i%2, sum = ADD ? d[i] : 0;
                for (int k = 0; k < 32; k++) sum += A(r, k)*B(k, n);
                d[i] = sum;
            }
            meet();
        });
    }
};
DEV void wgmma_fence() {}
DEV void wgmma_commit() { me->groups.push_back({}); me->groups.back().swap(me->started); }
template<int PENDING> DEV void wgmma_wait() {
    meet();
    for (auto& groups = me->groups; groups.size() > PENDING; groups.pop_front()) for (auto& product : groups.front()) product();
}
DEV void pin(int&) {}
DEV void pin(uint32_t&) {}
DEV void pin(float&) {}
template<int N> DEV void fewer_registers() {}
template<int N> DEV void more_registers() {}
DEV uint32_t transpose(uint32_t v) {
    warp().in[lane_id()][0] = v; meet();
    uint32_t d = 0;
    for (int i = 0; i < 2; i++) {   // d holds row lane/4, columns 2(lane%4) + i of the transpose
        int r = lane_id()%4*2 + i, c = lane_id()/4;
        d |= (warp().in[r*4 + c/2][0] >> c%2*16 & 0xffff) << 16*i;
    }
    meet();
    return d;
}
DEV uint32_t half_mul(uint32_t a, uint32_t b) { return to_half(to_float(a & 0xffff)*to_float(b & 0xffff)) | (uint32_t)to_half(to_float(a >> 16)*to_float(b >> 16)) << 16; }
DEV uint32_t half_sub(uint32_t a, uint32_t b) { return to_half(to_float(a & 0xffff) - to_float(b & 0xffff)) | (uint32_t)to_half(to_float(a >> 16) - to_float(b >> 16)) << 16; }
DEV uint32_t floats_to_bf16(float lo, float hi) { return float_to_bf16(lo) | (uint32_t)float_to_bf16(hi) << 16; }
DEV void grid_wait() {}
DEV void grid_launch_next() {}
DEV uint32_t cluster_size() { return here->cluster->blocks.size(); }
DEV uint32_t cluster_rank() { return here->rank; }
DEV void cluster_arrive_first() {}
DEV void bars_made() {}
DEV void cluster_arrive() {}
DEV void cluster_wait() { wait_for_all(here->cluster->sync); }
DEV void store_in_rank(float* p, uint32_t rank, float v) { *(float*)(here->cluster->blocks[rank].shared + ((uint8_t*)p - here->shared)) = v; }

// one cluster after the other; shared memory starts full of NaNs and may not be written past its end
static void call(const void* kernel, void** args);   // defined behind the kernels: knows their parameters
static const void* launched; static void** arguments;
static void lane_main() {                                                // the last to end goes back to who launched all
    call(launched, arguments);
    need(me->started.empty() && me->groups.empty(), "products that nobody waited for");
    if (--running) setcontext(&(run(next_ready()), me)->at);
    setcontext(&launcher);
}
static int launch(const void* kernel, void** args, int blocks, int threads, int ranks, int bytes, int, void*) {
    static std::mutex one; std::lock_guard<std::mutex> hold(one);
    static std::vector<Fiber> fibers;
    const int guard = 256, stack = 1 << 18;
    if (!ranks) ranks = blocks;                                          // all at once: they wait for each other
    launched = kernel; arguments = args; blockDim.x = threads; gridDim.x = blocks;
    for (int first = 0; first < blocks; first += ranks) {
        Cluster c; c.blocks.resize(ranks); c.sync.of = c.sync.left = running = ranks*threads;
        if ((int)fibers.size() < running) fibers.resize(running);
        for (int r = 0; r < ranks; r++) {
            Block& b = c.blocks[r];
            b.shared = (uint8_t*)aligned_alloc(1024, (bytes + guard + 1023)/1024*1024); memset(b.shared, 0xff, bytes + guard);
            b.rank = r; b.cluster = &c; b.warps.resize(threads/32); b.sync.of = b.sync.left = threads;
            for (auto& w : b.warps) w.sync.of = w.sync.left = 32;
            for (int t = 0; t < threads; t++) {
                Fiber& f = fibers[r*threads + t];
                if (!f.stack) f.stack.reset(new char[stack]);
                f.block = &b; f.lane = t; f.index = first + r;
                getcontext(&f.at); f.at.uc_stack.ss_sp = f.stack.get(); f.at.uc_stack.ss_size = stack; makecontext(&f.at, lane_main, 0);
                ready.push_back(&f);
            }
        }
        Fiber* next = next_ready();
        run(next); swapcontext(&launcher, &next->at);
        deliver_all(); barriers.clear();
        for (auto& b : c.blocks) {
            for (int i = 0; i < guard; i++) need(b.shared[bytes + i] == 0xff, "a write past the end of shared memory");
            free(b.shared);
        }
    }
    return 0;
}
extern "C" void cuda_on_cpu_range(const void* from, int64_t bytes) { global_from = (const uint8_t*)from; global_to = global_from + bytes; }
