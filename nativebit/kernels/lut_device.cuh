// The instructions that the kernels are made of, one small function each. tests/cuda_on_cpu.h has the same functions for a CPU.
#pragma once
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cudaTypedefs.h>
#include <stdint.h>
#define DEV __device__ __forceinline__
// ARCH: ten times the compute capability. From 90 on there are bulk copies, clusters and kernels that overlap; at 90 alone products of warpgroups.

DEV uint32_t prmt(uint32_t a, uint32_t b, uint32_t s) { uint32_t d; asm("prmt.b32 %0,%1,%2,%3;" : "=r"(d) : "r"(a), "r"(b), "r"(s)); return d; }
#if ARCH >= 89
DEV uint32_t e4m3x2(uint32_t v) {   // two e4m3 in the low 16 bits -> half2
    uint32_t d; asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, l;}" : "=r"(d) : "r"(v)); return d;
}
DEV uint32_t e4m3x2_high(uint32_t v) {   // the two in the high 16 bits
    uint32_t d; asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, h;}" : "=r"(d) : "r"(v)); return d;
}
#endif
DEV uint32_t least(uint32_t a, uint32_t b) { uint32_t d; asm("min.s16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }   // of two integers of 16 bits each
DEV uint32_t most_of(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }   // of two integers of 16 bits each, without a sign
DEV uint32_t as_it_is(uint32_t v) { uint32_t d; asm("mov.b32 %0, %1;" : "=r"(d) : "r"(v)); return d; }   // what the compiler neither computes anew nor merges with what follows
DEV float half_to_float(uint32_t v) { return __half2float(__ushort_as_half((unsigned short)v)); }
DEV uint32_t floats_to_half2(float lo, float hi) {   // a value beyond fp16 becomes its largest number, not infinity
    uint32_t d; asm("cvt.rn.satfinite.f16x2.f32 %0, %2, %1;" : "=r"(d) : "f"(lo), "f"(hi)); return d;
}
DEV float fast_ratio(float a, float b) { return __fdividef(a, b); }
DEV float full_ratio(float a, float b) { float d; asm("div.full.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b)); return d; }   // as Triton divides; of large numbers, too
DEV float fast_exp(float v) { return __expf(v); }
DEV float fast_log(float v) { return __logf(v); }
DEV float inverse_sqrt(float v) { return rsqrtf(v); }
DEV uint16_t float_to_half(float v) { return __half_as_ushort(__float2half_rn(v)); }
DEV uint16_t float_to_bf16(float v) { uint16_t d; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(v)); return d; }

DEV uint32_t floats_to_f16(float lo, float hi) { uint32_t d; asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(d) : "f"(lo), "f"(hi)); return d; }   // infinity beyond fp16
DEV uint32_t floats_to_bf16(float lo, float hi) { uint32_t d; asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(d) : "f"(lo), "f"(hi)); return d; }

// tensor cores: c (16 x 8) += a (16 x k) b (k x 8)
DEV void mma_f16(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEV void mma_s8(int* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEV void load_matrices(uint32_t* d, const void* row) {   // four 8 x 8 matrices of 16-bit numbers, a pair of each a lane; lane i has the address of row i%8 of matrix i/8
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory");
}
DEV void store_turned(void* row, const uint32_t* v) {   // four such matrices, transposed, to rows whose addresses lanes have in the same way
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" :: "r"((uint32_t)__cvta_generic_to_shared(row)), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}
DEV uint32_t shfl(uint32_t v, int lane) { return __shfl_sync(~0u, v, lane); }
DEV float shfl_xor(float v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
DEV void warp_sync() { __syncwarp(); }
#ifdef STAMPS   // to see where a launch's time goes (kernels/bench_timeline.py)
DEV uint64_t now() { uint64_t t; asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t) :: "memory"); return t; }   // nanoseconds, the same for all of the GPU
DEV uint32_t processor() { uint32_t i; asm volatile("mov.u32 %0, %smid;" : "=r"(i)); return i; }
#endif
DEV void sync_some(int threads) { asm volatile("bar.sync 1, %0;" :: "r"(threads) : "memory"); }   // some of the block's threads

// memory: bulk copies that count down a barrier in shared memory, and loads that see what another kernel, or another block, has just written
DEV uint8_t* align_1024(uint8_t* p) { return p + (1024 - (uint32_t)__cvta_generic_to_shared(p)%1024)%1024; }
DEV uint32_t saddr(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
DEV uint4 load_x(const void* p) { return __ldcg((const uint4*)p); }
DEV uint4 load_once(const void* p) { return __ldcs((const uint4*)p); }   // first to leave the caches
DEV uint16_t load_u16(const uint16_t* p) { return __ldcg(p); }
DEV long long load_i64(const long long* p) { return __ldcg(p); }
DEV int load_int(const unsigned* p) { return (int)__ldcg(p); }
DEV uint32_t add_release(unsigned* p, unsigned v) { uint32_t old; asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory"); return old; }
DEV uint4 load_now(const void* p) {   // what L2 holds at this moment
    uint4 v; asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory"); return v;
}
DEV void send(uint16_t* p, uint16_t v) { asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" :: "l"(p), "h"(v) : "memory"); }
DEV void send(uint16_t* p, uint4 v) { asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" :: "l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory"); }
DEV void sent_before() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }   // what this thread has sent is there before anything that follows
DEV void fetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" :: "l"(p)); }   // into the L2 cache
DEV void bar_init(uint64_t* bar, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(saddr(bar)), "r"(arrivals) : "memory");
#if ARCH >= 90
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
DEV void bar_expect(uint64_t* bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(saddr(bar)), "r"(bytes) : "memory");
}
DEV void bar_arrive(uint64_t* bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(saddr(bar)) : "memory"); }
DEV void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* bar) {   // read once: first to leave the L2 cache
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
        :: "r"(saddr(dst)), "l"(src), "r"(bytes), "r"(saddr(bar)), "l"(policy) : "memory");
}
DEV void bulk_load_again(void* dst, const void* src, uint32_t bytes, uint64_t* bar) {   // what other blocks read, too
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        :: "r"(saddr(dst)), "l"(src), "r"(bytes), "r"(saddr(bar)) : "memory");
}
// by all threads of a block, each of which arrives when its parts are there
DEV void copy_piece(void* dst, const void* src, bool inside) {   // 16 bytes, or zeros
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(saddr(dst)), "l"(src), "r"(inside ? 16 : 0) : "memory");
}
DEV void copy_run(void* dst, const void* src, int bytes) {
    for (int i = 16*threadIdx.x; i < bytes; i += 16*blockDim.x) copy_piece((uint8_t*)dst + i, (const uint8_t*)src + i, true);
}
DEV void arrive_copied(uint64_t* bar) { asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" :: "r"(saddr(bar)) : "memory"); }
DEV void copy_together(void* dst, const void* src, int bytes, uint64_t* bar) { copy_run(dst, src, bytes); arrive_copied(bar); }
#if ARCH >= 90
#define TRY_WAIT "try_wait"   // sleeps for a while
#else
#define TRY_WAIT "test_wait"
#endif
DEV void bar_wait(uint64_t* bar, uint32_t phase) {
    asm volatile("{.reg .pred p; WAIT: mbarrier." TRY_WAIT ".parity.shared::cta.b64 p, [%0], %1; @p bra DONE; bra WAIT; DONE:}"
        :: "r"(saddr(bar)), "r"(phase) : "memory");
}

// grids and clusters: wait for the kernel before this one, let the next one start; store into a neighbour's shared memory
#if ARCH >= 90
DEV void grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEV void grid_launch_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEV uint32_t cluster_size() { uint32_t v; asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(v)); return v; }
DEV uint32_t cluster_rank() { uint32_t v; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(v)); return v; }
DEV void cluster_arrive_first() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }   // says only that this block has started
DEV void bars_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }   // before that: the others may use this block's barriers
DEV void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
DEV void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
DEV void store_in_rank(float* p, uint32_t rank, float v) {
    uint32_t a; asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(a) : "r"(saddr(p)), "r"(rank));
    asm volatile("st.shared::cluster.f32 [%0], %1;" :: "r"(a), "f"(v) : "memory");
}
typedef uint32_t Remote;   // barriers of a block of the cluster
DEV Remote remote(uint64_t* bars, uint32_t rank) { uint32_t a; asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(a) : "r"(saddr(bars)), "r"(rank)); return a; }
DEV void arrive(Remote bars, int i) { asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" :: "r"(bars + 8*i) : "memory"); }
DEV void send4(float* p, uint64_t* bar, uint32_t rank, const float* v) {   // 16 bytes, which count down a barrier there
    uint32_t a, b;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(a) : "r"(saddr(p)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(b) : "r"(saddr(bar)), "r"(rank));
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];"
        :: "r"(a), "r"(b), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}
#else   // a kernel begins when the one before has ended, and a block is alone
DEV void grid_wait() {}
DEV void grid_launch_next() {}
DEV uint32_t cluster_size() { return 1; }
DEV uint32_t cluster_rank() { return 0; }
DEV void cluster_arrive_first() {}
DEV void bars_made() {}
DEV void cluster_arrive() {}
DEV void cluster_wait() {}
DEV void store_in_rank(float* p, uint32_t, float v) { *p = v; }
DEV void send4(float*, uint64_t*, uint32_t, const float*) {}
#endif

// a warpgroup's tensor cores: d (64 x N) += (or without ADD: =) a (64 x 16, registers) b (16 x N, shared memory, rows of 128 bytes in swizzled order)
template<int N> struct Wgmma;
#define S4 "%0, %1, %2, %3"
#define S8 S4 ", %4, %5, %6, %7"
#define S16 S8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define S0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define S32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define S64 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define S96 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define H12 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43"
#define H24 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87"
#define H32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define H64 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define D32(i) D16(i), D16(i + 16)
#define WGMMA(N, SUMS, A0, A1, A2, A3, B, ...) template<> struct Wgmma<N> { template<bool ADD = true> DEV static void run(float* d, const uint32_t* a, uint64_t b) { \
    if (ADD) asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" SUMS "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", 1, 1, 1, 0;" \
        : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
    else asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" SUMS "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", 0, 1, 1, 0;" \
        : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); } };
WGMMA(8, S4, 4, 5, 6, 7, 8, D4(0))
WGMMA(16, S8, 8, 9, 10, 11, 12, D4(0), D4(4))
WGMMA(32, S16, 16, 17, 18, 19, 20, D16(0))
WGMMA(64, S0, 32, 33, 34, 35, 36, D32(0))
WGMMA(88, S0 ", " H12, 44, 45, 46, 47, 48, D32(0), D4(32), D4(36), D4(40))
WGMMA(96, S0 ", " H32, 48, 49, 50, 51, 52, D32(0), D16(32))
WGMMA(128, S0 ", " S32, 64, 65, 66, 67, 68, D32(0), D32(32))
WGMMA(160, S0 ", " S32 ", " H64, 80, 81, 82, 83, 84, D32(0), D32(32), D16(64))
WGMMA(176, S0 ", " S32 ", " H24, 88, 89, 90, 91, 92, D32(0), D32(32), D16(64), D4(80), D4(84))
WGMMA(192, S0 ", " S32 ", " S64, 96, 97, 98, 99, 100, D32(0), D32(32), D32(64))
WGMMA(256, S0 ", " S32 ", " S64 ", " S96, 128, 129, 130, 131, 132, D32(0), D32(32), D32(64), D32(96))
// the same of integers: a (64 x 32), b (32 x N), both int8
template<int N> struct WgmmaS8;
#define I4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define I16(i) I4(i), I4(i + 4), I4(i + 8), I4(i + 12)
#define WGMMA_S8(N, SUMS, A0, A1, A2, A3, B, ...) template<> struct WgmmaS8<N> { template<bool ADD = true> DEV static void run(int* d, const uint32_t* a, uint64_t b) { \
    if (ADD) asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {" SUMS "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", 1;" \
        : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
    else asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {" SUMS "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", 0;" \
        : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); } };
WGMMA_S8(16, S8, 8, 9, 10, 11, 12, I4(0), I4(4))
WGMMA_S8(32, S16, 16, 17, 18, 19, 20, I16(0))
WGMMA_S8(64, S0, 32, 33, 34, 35, 36, I16(0), I16(16))
DEV uint32_t matrix_low(const void* p) { return (saddr(p) & 0x3ffff) >> 4 | 1u << 16; }   // of its descriptor; 32 bytes further: 2 more
DEV uint64_t matrix_of(uint32_t low) { return (uint64_t)(64u | 1u << 30) << 32 | low; }
DEV uint64_t matrix_at(const void* p) { return matrix_of(matrix_low(p)); }
DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template<int PENDING> DEV void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory"); }
DEV void pin(uint32_t& r) { asm volatile("" : "+r"(r) :: "memory"); }   // a register that a product still reads stays where it is
DEV void pin(int& r) { asm volatile("" : "+r"(r) :: "memory"); }
DEV void pin(float& r) { asm volatile("" : "+f"(r) :: "memory"); }
template<int N> DEV void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N)); }
template<int N> DEV void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N)); }
DEV uint32_t transpose(uint32_t v) {   // an 8 x 8 matrix of 16-bit numbers, a pair a lane
    uint32_t d; asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(v)); return d;
}
DEV uint32_t half_mul(uint32_t a, uint32_t b) { uint32_t d; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
DEV uint32_t half_sub(uint32_t a, uint32_t b) { uint32_t d; asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }

// a box of 64 columns x rows of a row-major fp16 matrix; beyond its edges come zeros
typedef CUtensorMap Map;
#define MAP_PARAM const __grid_constant__ Map
#if ARCH >= 90
DEV void box_load(void* dst, const Map* map, int column, int row, uint64_t* bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
        :: "r"(saddr(dst)), "l"(map), "r"(saddr(bar)), "r"(column), "r"(row) : "memory");
}
DEV void box_load_both(void* dst, const Map* map, int column, int row, uint64_t* bar) {   // into both blocks of a cluster, at the same place, and their barriers
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;"
        :: "r"(saddr(dst)), "l"(map), "r"(saddr(bar)), "r"(column), "r"(row), "h"((uint16_t)3) : "memory");
}
DEV void fetch_map(const Map* map) { asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory"); }   // before the first copy needs it
#else
DEV void box_load(void*, const Map*, int, int, uint64_t*) {}
DEV void fetch_map(const Map*) {}
#endif
// the units of 8 row tiles x one block of columns, one behind the other; beyond the last tile come zeros
DEV void units_load(void* dst, const Map* map, int unit, int kb, int tile, uint64_t* bar) { box_load(dst, map, kb*(unit/8), tile, bar); }
static int encode_map(Map* map, CUtensorMapDataType type, const void* p, uint64_t columns, uint64_t rows, uint64_t row_bytes, uint32_t box_columns, uint32_t box_rows, CUtensorMapSwizzle swizzle) {
    static PFN_cuTensorMapEncodeTiled_v12000 encode = nullptr;
    if (!encode) {
        cudaDriverEntryPointQueryResult found;
        cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void**)&encode, 12000, cudaEnableDefault, &found);
        if (e || found != cudaDriverEntryPointSuccess) { encode = nullptr; return -3; }
    }
    cuuint64_t size[2] = {columns, rows}, stride[1] = {row_bytes};
    cuuint32_t box[2] = {box_columns, box_rows}, step[2] = {1, 1};
    return encode(map, type, 2, (void*)p, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) ? -4 : 0;
}
static int make_map(Map* map, const void* x, int columns, int rows, int box_rows) {
    return encode_map(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, x, columns, rows, columns*2ull, 64, box_rows, CU_TENSOR_MAP_SWIZZLE_128B);
}
static int make_units_map(Map* map, const void* units, int unit, int blocks, int tiles) {
    return encode_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT64, units, (uint64_t)blocks*unit/8, tiles, (uint64_t)blocks*unit, unit/8, 8, CU_TENSOR_MAP_SWIZZLE_NONE);
}
static int attribute(cudaDeviceAttr a) { int d = 0, n = 0; cudaGetDevice(&d); cudaDeviceGetAttribute(&n, a, d); return n; }
static int processors() { return attribute(cudaDevAttrMultiProcessorCount); }
static int most_shared() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }   // bytes of a block

static int prefer_shared(const void* kernel) {   // an SM need not wait until it is empty to change how much of its memory is shared
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (e) cudaGetLastError();
    return e;
}

#define SHARED_BYTES(name) extern __shared__ __align__(128) uint8_t name[]
#define SHARED_1024(name) extern __shared__ __align__(1024) uint8_t name[]   // at a multiple of 1024, as swizzled boxes have to be, and where the compiler knows

// start a kernel; overlap: it may begin while the one before it still runs, and waits for it in grid_wait (each must: whoever has ended has waited for all
// before it); ranks: blocks of a cluster, 0: blocks that wait for each other, which must all be there at once
static int launch(const void* kernel, void** args, int blocks, int threads, int ranks, int bytes, int overlap, void* stream) {
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e) { cudaGetLastError(); return e; }
    cudaLaunchAttribute attr[2]; int n = 0;
    if (overlap && ARCH >= 90) { attr[n].id = cudaLaunchAttributeProgrammaticStreamSerialization; attr[n++].val.programmaticStreamSerializationAllowed = 1; }
    if (ranks > 1) { attr[n].id = cudaLaunchAttributeClusterDimension; attr[n].val.clusterDim.x = ranks; attr[n].val.clusterDim.y = attr[n].val.clusterDim.z = 1; n++; }
    if (ranks == 0) { attr[n].id = cudaLaunchAttributeCooperative; attr[n++].val.cooperative = 1; }
    cudaLaunchConfig_t cfg = {};
    cfg.gridDim = dim3(blocks); cfg.blockDim = dim3(threads); cfg.dynamicSmemBytes = bytes; cfg.stream = (cudaStream_t)stream; cfg.attrs = attr; cfg.numAttrs = n;
    e = cudaLaunchKernelExC(&cfg, kernel, args);
    if (e) cudaGetLastError();
    return e;
}
