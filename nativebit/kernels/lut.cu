// Linear layers over packed weights on an NVIDIA GPU, written for Hopper: y = x W^T, W held as 2, 3 or 4 index bits and a codebook a block.
// One library a geometry: nvcc -DBITS=3 -DE4M3=0 ... ; notebook 17 explains the layout and each step.
//
// A unit is 16 rows x 128 columns of W in one run of UNIT bytes; units lie row tile after row tile, along the input first:
//   index words  lane (g, t) = (lane/4, lane%4) owns columns 8c + 2t and 8c + 2t + 1, c = 0...15, of rows g and g+8: BITS words of either
//                3 bits: 32 x (A,B,C of g; A of g+8), then 32 x (B,C of g+8);  2, 4 bits: 32 x (words of g, words of g+8), in pieces of 16 bytes
//   codebooks    int8: rows g and g+8 in turn;  e4m3 (blocks of 8 x 64): for either half of the columns, rows 0-7, then rows 8-15
//   scales       int8: fp16, rows g and g+8 in turn;  e4m3: none here, one number a matrix
#ifndef ARCH
#define ARCH 90   // ten times the compute capability: at 90 all there is; below no clusters and copies by threads; elsewhere neither `prefill` nor `token`
#endif
#ifdef ON_CPU
#include "cuda_on_cpu.h"
#else
#include "lut_device.cuh"
#endif
#ifndef BITS
#define BITS 3
#endif
#ifndef E4M3
#define E4M3 0
#endif
#if ARCH < 89   // no instruction: an e4m3 in the high byte of a half, its exponent moved to where that of the half is, is 2^8 times too small
DEV uint32_t e4m3_halves(uint32_t v) { return half_mul((v & 0x80008000u) | (v & 0x7f007f00u) >> 1, 0x5c005c00u); }
DEV uint32_t e4m3x2(uint32_t v) { return e4m3_halves(prmt(v, 0, 0x1404u)); }
DEV uint32_t e4m3x2_high(uint32_t v) { return e4m3_halves(prmt(v, 0, 0x3424u)); }
#endif
constexpr int ENTRIES = 1 << BITS, INDEX_BYTES = 256*BITS, TABLE_BYTES = (E4M3 ? 4 : 16)*ENTRIES, UNIT = INDEX_BYTES + TABLE_BYTES + (E4M3 ? 0 : 32);
constexpr int TABLE_REGS = ENTRIES/4, HALVES = E4M3 ? 2 : 1;   // registers of a table; tables along the 128 columns
enum Mode { FP16 = 0, INT8 = 1, INT16 = 2 };   // what the activations are multiplied as

// What a thread block holds in shared memory: a barrier a tile, then these, at multiples of 128 bytes; the host works it out
struct Layout {
    int steps, x, sums, parts, squares, units, bytes;
    Layout(int tiles, int blocks, int M, int rows, int row_bytes, int ranks, int deep) {   // tiles, blocks: what the largest share has
        int at = 0;
        auto put = [&](int size) { int here = at; at += (size + 127)/128*128; return here; };
        put(8*tiles);
        steps = put(4*blocks*M);                                         // scales of the activations, (blocks, M)
        x = put(blocks*rows*row_bytes);
        sums = put(4*deep*tiles*16*M);                                   // of warps that share rows, (deep, M, 16*tiles)
        parts = put(ranks > 1 ? ranks*64*((tiles + ranks - 1)/ranks)*M : 0);   // of the cluster's blocks, for the tiles that this one writes
        squares = put(4*16);                                             // of the activations, a warp's each
        units = put(tiles*blocks*UNIT); bytes = at;
    }
};
// what may happen on the way in and out: x·norm/rms(x) of one token, or silu(first half of x)·second half; · factor of the row's part + bias + residual
struct Around { const void *norm, *bias, *residual; float eps; int gated, edge[2]; float factor[3]; };
struct Args { const uint8_t* units; const void* x; void* y; int O, I, M, KB, tiles, wide, deep, rank_bits; float scale; int bf16, flags; Around a; Layout at; };
enum Flags { NO_PRODUCTS = 1, NO_WAIT = 2 };   // wrong results: only to see what takes how long

// one lane's part of a unit: index words and table of rows g (0) and g+8 (1)
struct Lane { uint32_t word[2][BITS], table[2][HALVES*TABLE_REGS]; float scale[2]; };

DEV void read_words(Lane& u, const uint8_t* p, int lane) {
#if BITS == 3
    uint4 a = ((const uint4*)p)[lane]; uint2 b = ((const uint2*)(p + 512))[lane];
    u.word[0][0] = a.x; u.word[0][1] = a.y; u.word[0][2] = a.z; u.word[1][0] = a.w; u.word[1][1] = b.x; u.word[1][2] = b.y;
#elif BITS == 2
    uint4 a = ((const uint4*)p)[lane];
    u.word[0][0] = a.x; u.word[0][1] = a.y; u.word[1][0] = a.z; u.word[1][1] = a.w;
#else
    uint4 a = ((const uint4*)p)[lane], b = ((const uint4*)(p + 512))[lane];
    u.word[0][0] = a.x; u.word[0][1] = a.y; u.word[0][2] = a.z; u.word[0][3] = a.w;
    u.word[1][0] = b.x; u.word[1][1] = b.y; u.word[1][2] = b.z; u.word[1][3] = b.w;
#endif
}
DEV void read_table(Lane& u, const uint8_t* p, int lane, uint32_t flip) {   // flip: what int8 entries are xored with
    constexpr int N = 2*HALVES*TABLE_REGS;
    uint32_t r[N];
    const uint8_t* at = p + INDEX_BYTES + (E4M3 ? 0 : lane/4*2*ENTRIES);
    if (N == 2) { uint2 v = *(const uint2*)at; r[0] = v.x; r[1] = v.y; }
    else {
#pragma unroll
        for (int i = 0; i < N/4; i++) { uint4 v = ((const uint4*)at)[i]; r[4*i%N] = v.x; r[(4*i + 1)%N] = v.y; r[(4*i + 2)%N] = v.z; r[(4*i + 3)%N] = v.w; }
    }
#pragma unroll
    for (int i = 0; i < N; i++) u.table[i/TABLE_REGS%2][i/(2*TABLE_REGS)*TABLE_REGS + i%TABLE_REGS] = E4M3 ? r[i] : r[i] ^ flip;
    if (E4M3) return;
    uint32_t s = ((const uint32_t*)(p + INDEX_BYTES + TABLE_BYTES))[lane/4];
    u.scale[0] = half_to_float(s & 0xffff); u.scale[1] = half_to_float(s >> 16);
}
// eight selectors, one a nibble: the indices of weights 8k...8k+7
DEV uint32_t selectors(const uint32_t* w, int k) {
#if BITS == 3
    if (k < 3) return w[k] & 0x77777777u;
    return ((w[0] >> 3) & 0x11111111u) | ((w[1] >> 2) & 0x22222222u) | ((w[2] >> 1) & 0x44444444u);
#elif BITS == 2
    return (w[k/2] >> (k%2*2)) & 0x33333333u;
#else
    return w[k];
#endif
}
// four table bytes, picked by the low four nibbles of s
DEV uint32_t look_up(const uint32_t* table, uint32_t s) {
#if BITS == 4
    uint32_t lo = prmt(table[0], table[1], s & 0x7777u), hi = prmt(table[2], table[3], s & 0x7777u), m = prmt(0xff00u, 0, (s >> 3) & 0x1111u);
    return (lo & ~m) | (hi & m);
#else
    return prmt(table[0], table[BITS == 3], s);
#endif
}
// the a operand of one tensor-core step: weights 4s...4s+3 of both rows as fp16; int8 entries come as 1024 + 128 + entry.
// SPARE: selectors are made once and kept, not shifted again where they are used; `decode` was measured without
template<bool SPARE = false> DEV void weights_f16(uint32_t* a, const Lane& u, int s) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const uint32_t all = selectors(u.word[r], s/2), eight = SPARE ? as_it_is(all) : all, four = eight >> (s%2*16);
        uint32_t v = look_up(u.table[r] + (HALVES == 2 ? s/4*TABLE_REGS : 0), four);
        a[r] = E4M3 ? e4m3x2(v) : prmt(v, 0x64646464u, 0x4140u);
        a[r + 2] = E4M3 ? e4m3x2_high(v) : prmt(v, 0x64646464u, 0x4342u);
    }
}

// A few tokens. A cluster of thread blocks computes some row tiles; each of its thread blocks takes part of the input, a rectangle of units. Of
// those a warp takes some tiles, TJ at a time, and some blocks of 128 columns. int8 entries are multiplied as they are looked up, by activations
// in int8, or in int16 as two planes of int8 that are two columns of the same product; e4m3 entries become fp16.
constexpr bool FLOAT = E4M3;
constexpr int X_WORDS = FLOAT ? 64 : 32;   // of a row of 128 activations, in the order of a tensor core's second operand
DEV int part(int total, int i, int of) { return total*i/of; }
template<int MODE> DEV int x_rows(int M) { return MODE == INT16 ? 2*M : M; }

DEV float lo_half(uint32_t v) { return half_to_float(v & 0xffff); }
DEV float hi_half(uint32_t v) { return half_to_float(v >> 16); }
DEV uint32_t bf16_as_half(uint32_t v) { return floats_to_half2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)); }
DEV uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }      // of absolute numbers, by their bits: a NaN is the largest
DEV uint32_t top_of(uint32_t top, uint32_t v) { return larger(top, larger(__float_as_uint(fabsf(lo_half(v))), __float_as_uint(fabsf(hi_half(v))))); }

DEV float silu(float v) { return fast_ratio(v, 1.f + fast_exp(-v)); }

// 16 neighbouring activations as words 2i, 2i + 1 of each of four lanes
struct Piece {
    uint32_t v[8];
    DEV void load(const void* row, int k, int columns) {
        const uint16_t* x = (const uint16_t*)row + k;
        const uint4 zero = make_uint4(0, 0, 0, 0), a = k < columns ? load_x(x) : zero, b = k + 8 < columns ? load_x(x + 8) : zero;
        v[0] = a.x; v[1] = a.y; v[2] = a.z; v[3] = a.w; v[4] = b.x; v[5] = b.y; v[6] = b.z; v[7] = b.w;
    }
    DEV float squares() const {
        float t = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) t = fmaf(lo_half(v[i]), lo_half(v[i]), fmaf(hi_half(v[i]), hi_half(v[i]), t));
        return t;
    }
    DEV void times(const Piece& w) {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = floats_to_half2(lo_half(v[i])*lo_half(w.v[i]), hi_half(v[i])*hi_half(w.v[i]));
    }
    DEV void gates(const Piece& up) {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = floats_to_half2(silu(lo_half(v[i]))*lo_half(up.v[i]), silu(hi_half(v[i]))*hi_half(up.v[i]));
    }
    DEV uint32_t top() const {
        uint32_t t = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) t = top_of(t, v[i]);
        return t;
    }
    DEV void as_half() {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = bf16_as_half(v[i]);
    }
    // lane t's columns 2t, 2t + 1, 8 + 2t, 9 + 2t as bytes: the low one of the rounded numbers, or with `high` what is above it
    DEV uint32_t bytes(int t, float inv, bool high) const {
        const float magic = 12582912.f + (high ? 128.f : 0.f);           // the sum's low bits are the rounded number
        const uint32_t pick = high ? 0x0051u : 0x0040u;
        uint32_t a = __float_as_uint(fmaf(lo_half(v[t]), inv, magic)), b = __float_as_uint(fmaf(hi_half(v[t]), inv, magic));
        uint32_t c = __float_as_uint(fmaf(lo_half(v[t + 4]), inv, magic)), d = __float_as_uint(fmaf(hi_half(v[t + 4]), inv, magic));
        return prmt(prmt(a, b, pick), prmt(c, d, pick), 0x5410u);
    }
};
// where word i of lane t of a row lies: four words of a lane side by side, lanes and rows behind one another; which lane comes first turns
// from block to block, so that writers of several blocks meet in fewer banks
DEV int x_at(int rows, int b, int row, int i, int t) { return ((b*(X_WORDS/16) + i/4)*rows + row)*16 + 4*((t + b + i/4)%4) + i%4; }

// activations as integers: of 128 columns, which eight lanes have; with a NaN among them the step is one
struct Rounded {
    float inv, step;
    DEV Rounded(const Piece& q, float range = 32512.f) {
        uint32_t most = q.top();
#pragma unroll
        for (int i = 1; i < 8; i *= 2) most = larger(most, __float_as_uint(shfl_xor(__uint_as_float(most), i)));
        const float top = __uint_as_float(most);
        inv = top > 0 ? fast_ratio(range, top) : 0.f; step = top*(1/range);
    }
};
template<int MODE> DEV void put_x(uint32_t* x, float* steps, Piece q, int rows, int M, int token, int b, int i, bool inside) {
    if (FLOAT) {
#pragma unroll
        for (int t = 0; t < 4; t++) if (inside) *(uint2*)(x + x_at(rows, b, token, 2*i, t)) = make_uint2(q.v[t], q.v[t + 4]);
        return;
    }
    const Rounded r(q, MODE == INT8 ? 127.f : 32512.f);
    const float inv = r.inv;
    if (!inside) return;
    if (i == 0) steps[b*M + token] = r.step;
#pragma unroll
    for (int t = 0; t < 4; t++) {
        if (MODE == INT8) x[x_at(rows, b, token, i, t)] = q.bytes(t, inv, false);
        else { x[x_at(rows, b, 2*token, i, t)] = q.bytes(t, inv, true); x[x_at(rows, b, 2*token + 1, i, t)] = q.bytes(t, inv, false); }
    }
}
template<int MODE, int NT> DEV void read_x(uint32_t* x, float* steps, const Args& p, int k0, int nk) {   // a piece a thread, or several on their way
    constexpr int N = NT > 1 ? 4 : 1;
    const int total = p.M*nk*8, rows = x_rows<MODE>(p.M), lane = threadIdx.x%32;
    for (int first = threadIdx.x - lane; first < total; first += N*blockDim.x) {
        Piece q[N];
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int i = min(first + n*(int)blockDim.x + lane, total - 1), token = p.M == 1 ? 0 : i/8/nk;
            q[n].load((const uint16_t*)p.x + (size_t)token*p.I, (k0 + i/8 - token*nk)*128 + i%8*16, p.I);
        }
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int i = first + n*blockDim.x + lane, token = p.M == 1 ? 0 : i/8/nk;
            if (p.bf16) q[n].as_half();
            put_x<MODE>(x, steps, q[n], rows, p.M, token, i/8 - token*nk, i%8, i < total);
        }
    }
}

// one token that is normed or gated first; of the norm, only the weights: what all outputs are divided by comes at the end
template<int MODE> DEV void read_other_x(uint32_t* x, float* steps, float* squares, const Args& p, int k0, int nk) {
    const int total = p.KB*8, lane = threadIdx.x%32;
    float sum = 0;
    for (int first = threadIdx.x - lane; first < total; first += blockDim.x) {
        const int i = min(first + lane, total - 1), b = i/8 - k0, k = i*16;
        Piece q, w;
        q.load(p.x, k, p.I); w.load(p.a.gated ? (const uint16_t*)p.x + p.I : p.a.norm, k, p.I);
        if (p.bf16) { q.as_half(); w.as_half(); }
        if (p.a.gated) q.gates(w);
        else { sum += first + lane < total ? q.squares() : 0.f; q.times(w); }
        put_x<MODE>(x, steps, q, x_rows<MODE>(1), 1, 0, b, i%8, first + lane < total && b >= 0 && b < nk);
    }
#pragma unroll
    for (int d = 16; d; d /= 2) sum += shfl_xor(sum, d);
    if (lane == 0) squares[threadIdx.x/32] = sum;
}

// TJ tiles of 16 rows, all tokens
template<int MODE, int NT, int TJ> struct Tiles {
    static constexpr int PER = MODE == INT16 ? 2 : 4;                    // sums a lane holds of 16 rows x 8 columns of the product
    float acc[TJ][NT][PER];
    DEV void clear() {
#pragma unroll
        for (int i = 0; i < TJ*NT*PER; i++) (&acc[0][0][0])[i] = 0.f;
    }
    DEV static int token_of(int n, int i, int t) { return MODE == INT16 ? 4*n + t : 8*n + 2*t + i%2; }
    DEV static int row_of(int i, int g) { return MODE == INT16 ? g + 8*i : g + 8*(i/2); }

    DEV void step_float(const Lane* u, const uint4* x, int rows, int b0, int lane) {
#pragma unroll
        for (int q = 0; q < 4; q++) {
            uint4 b[NT];
#pragma unroll
            for (int n = 0; n < NT; n++) b[n] = x[(q*rows + min(8*n + lane/4, rows - 1))*4 + (lane + b0 + q)%4];
#pragma unroll
            for (int j = 0; j < TJ; j++)
#pragma unroll
                for (int s = 0; s < 2; s++) {
                    uint32_t a[4]; weights_f16(a, u[j], 2*q + s);
#pragma unroll
                    for (int n = 0; n < NT; n++) mma_f16(acc[j][n], a, s ? b[n].z : b[n].x, s ? b[n].w : b[n].y);
                }
        }
    }
    DEV void step_int(const Lane* u, const uint4* x, int rows, int b0, const float* steps, int M, int lane) {
        int c[TJ][NT][4];
#pragma unroll
        for (int i = 0; i < TJ*NT*4; i++) (&c[0][0][0])[i] = 0;
#pragma unroll
        for (int q = 0; q < 2; q++) {
            uint4 b[NT];
#pragma unroll
            for (int n = 0; n < NT; n++) b[n] = x[(q*rows + min(8*n + lane/4, rows - 1))*4 + (lane + b0 + q)%4];
#pragma unroll
            for (int j = 0; j < TJ; j++)
#pragma unroll
                for (int s = 0; s < 2; s++) {
                    uint32_t s0 = selectors(u[j].word[0], 2*q + s), s1 = selectors(u[j].word[1], 2*q + s);
                    uint32_t a[4] = {look_up(u[j].table[0], s0), look_up(u[j].table[1], s1), look_up(u[j].table[0], s0 >> 16), look_up(u[j].table[1], s1 >> 16)};
#pragma unroll
                    for (int n = 0; n < NT; n++) mma_s8(c[j][n], a, s ? b[n].z : b[n].x, s ? b[n].w : b[n].y);
                }
        }
#pragma unroll
        for (int i = 0; i < TJ*NT*PER; i++) {
            const int j = i/PER/NT, n = i/PER%NT, e = i%PER;
            const float step = steps[min(token_of(n, e, lane%4), M - 1)]*u[j].scale[MODE == INT16 ? e : e/2];
            acc[j][n][e] = fmaf((float)(MODE == INT16 ? c[j][n][2*e%4]*256 + c[j][n][(2*e + 1)%4] : c[j][n][e]), step, acc[j][n][e]);
        }
    }
    // one block of 128 columns: `units` of the TJ tiles, each `stride` bytes behind the other
    DEV void step(const uint8_t* units, int stride, const uint32_t* x, const float* steps, int b, int M, int lane) {
        const int rows = x_rows<MODE>(M);
        Lane u[TJ];
#pragma unroll
        for (int j = 0; j < TJ; j++) { read_words(u[j], units + j*stride + b*UNIT, lane); read_table(u[j], units + j*stride + b*UNIT, lane, 0); }
        const uint4* mine = (const uint4*)(x + b*rows*X_WORDS);
        if (FLOAT) step_float(u, mine, rows, b, lane); else step_int(u, mine, rows, b, steps + b*M, M, lane);
    }
    DEV void store(float* sums, int tile, int size, int M, int lane) {   // sums: (M, size)
#pragma unroll
        for (int i = 0; i < TJ*NT*PER; i++) {
            const int token = token_of(i/PER%NT, i%PER, lane%4);
            if (token < M) sums[token*size + (tile + i/PER/NT)*16 + row_of(i%PER, lane/4)] = acc[i/PER/NT][i/PER%NT][i%PER];
        }
    }
};
DEV float number(const void* x, size_t i, int bf16) {
    const uint32_t v = load_u16((const uint16_t*)x + i);
    return bf16 ? __uint_as_float(v << 16) : half_to_float(v);
}
DEV void write_y(const Args& p, int token, int row, float v, float factor) {   // factor: of all rows
    if (row >= p.O) return;
    v *= factor*p.a.factor[(row >= p.a.edge[0]) + (row >= p.a.edge[1])];
    const size_t i = (size_t)token*p.O + row;
    if (p.a.bias) v += number(p.a.bias, row, p.bf16);
    if (p.a.residual) v += number(p.a.residual, i, p.bf16);
    ((uint16_t*)p.y)[i] = p.bf16 ? float_to_bf16(v) : float_to_half(v);
}
DEV float factor_of(const Args& p, const float* squares) {
    if (!p.a.norm) return p.scale;
    float sum = 0;
    for (int w = 0; w < (int)blockDim.x/32; w++) sum += squares[w];
    return p.scale/sqrtf(sum/p.I + p.a.eps);
}

template<int MODE, int NT, int TJ> __global__ void __launch_bounds__(512, NT == 1 ? 2 : 1) decode(const Args p) {
    SHARED_BYTES(smem);
    const int lane = threadIdx.x%32, warp = threadIdx.x/32, ranks = cluster_size(), rank = cluster_rank(), clusters = gridDim.x/ranks, cluster = blockIdx.x/ranks;
    const int wide = p.wide, deep = p.deep;                              // warps side by side along the tiles, and along the input
    const int tile = part(p.tiles, cluster, clusters), tiles = part(p.tiles, cluster + 1, clusters) - tile;
    const int k0 = part(p.KB, rank, ranks), nk = part(p.KB, rank + 1, ranks) - k0, size = 16*tiles;
    const Layout& at = p.at;
    uint64_t* bar = (uint64_t*)smem;
    float *steps = (float*)(smem + at.steps), *sums = (float*)(smem + at.sums), *parts = (float*)(smem + at.parts), *squares = (float*)(smem + at.squares);
    const int begin = part(tiles, warp%wide, wide), end = part(tiles, warp%wide + 1, wide), b0 = part(nk, warp/wide, deep), b1 = part(nk, warp/wide + 1, deep);
    if (ranks > 1) cluster_arrive_first();
#if ARCH >= 90
    // compute-sanitizer's racecheck warns of the next line (init against expect): it is one thread and its own barrier, and others wait for it behind __syncthreads
    if (threadIdx.x < tiles) {                                           // ask for all weights
        bar_init(bar + threadIdx.x, 1); bar_expect(bar + threadIdx.x, nk*UNIT);
        bulk_load(smem + at.units + threadIdx.x*nk*UNIT, p.units + ((size_t)(tile + threadIdx.x)*p.KB + k0)*UNIT, nk*UNIT, bar + threadIdx.x);
    }
#else
    if (threadIdx.x < tiles) bar_init(bar + threadIdx.x, blockDim.x);
    __syncthreads();
    for (int t = 0; t < tiles; t++) copy_together(smem + at.units + t*nk*UNIT, p.units + ((size_t)(tile + t)*p.KB + k0)*UNIT, nk*UNIT, bar + t);
#endif
    grid_launch_next();                                                  // the next kernel may queue its weights behind ours
    if (!(p.flags & NO_WAIT)) grid_wait();                               // from here on we read what the kernel before us wrote
    if (p.a.norm || p.a.gated) read_other_x<MODE>((uint32_t*)(smem + at.x), steps, squares, p, k0, nk);
    else read_x<MODE, NT>((uint32_t*)(smem + at.x), steps, p, k0, nk);
    __syncthreads();
    for (int j = begin; j < end; j += TJ) {
        const int first = max(min(j, end - TJ), 0);                      // an odd tile out goes with one that is done
        Tiles<MODE, NT, TJ> t; t.clear();
        for (int i = 0; i < TJ; i++) bar_wait(bar + first + i, 0);
        for (int b = b0; b < b1 && !(p.flags & NO_PRODUCTS); b++) t.step(smem + at.units + first*nk*UNIT, nk*UNIT, (const uint32_t*)(smem + at.x), steps, b, p.M, lane);
        t.store(sums + warp/wide*size*p.M, first, size, p.M, lane);
    }
    __syncthreads();
    const int bits = p.rank_bits, share = 16*((tiles + ranks - 1) >> bits);   // rows that a rank writes: those of every so manieth tile
    const float factor = factor_of(p, squares);
    if (ranks > 1) cluster_wait();
    for (int i = threadIdx.x; i < p.M*size; i += blockDim.x) {
        const int token = p.M == 1 ? 0 : i/size, o = i - token*size;
        float v = 0;
        for (int w = 0; w < deep; w++) v += sums[w*p.M*size + i];
        if (ranks == 1) write_y(p, token, tile*16 + o, v, factor);
        else store_in_rank(parts + (rank*p.M + token)*share + (o/16 >> bits)*16 + o%16, o/16 & (ranks - 1), v);
    }
    if (ranks == 1) return;
    cluster_arrive(); cluster_wait();
    for (int i = threadIdx.x; i < p.M*share; i += blockDim.x) {
        const int token = p.M == 1 ? 0 : i/share, o = i - token*share, j = (o/16 << bits) + rank;   // j: of the cluster's tiles
        float v = 0;
        for (int r = 0; r < ranks; r++) v += parts[r*p.M*share + i];
        if (j < tiles) write_y(p, token, (tile + j)*16 + o%16, v, factor);
    }
}

#if ARCH == 90
// Many tokens: tiles of 128 rows x BM tokens. One warp copies units and activations ahead; two warpgroups of 64 rows each dequantize
// into the registers from which their tensor cores read, a half block while the other half is multiplied.
enum How { PAIR = 1, REST = 2 };   // ways to share the work out, with the same bits as result
// PAIR   clusters of two blocks, 256 rows: each copies half of the activations into the shared memory of both
// REST   the row tiles left over after rounds of tiles of 256 tokens come in tiles of REST_BM, so that all processors have some
constexpr int REST_BM = 176;
template<int N> struct Width { static constexpr int tokens = N; };
template<int BM> struct Prefill {
    // 32 columns are multiplied as soon as they are dequantized, not 64, where that was faster; then a half block is two groups of products
    static constexpr bool STEPS = BM == 128 || BM == 256 || (!E4M3 && BM < 160);
    static constexpr int OF_A_HALF = STEPS ? 2 : 1, ROWS = 128, X_BYTES = BM*256, W_BYTES = 8*UNIT, RUN_BYTES = 512, OTHER = 8*RUN_BYTES + 256, STAGE_BYTES = X_BYTES + W_BYTES;
    static constexpr int STAGES = (232448 - OTHER)/STAGE_BYTES < 6 ? (232448 - OTHER)/STAGE_BYTES : 6, BYTES = STAGES*STAGE_BYTES + OTHER;
    static constexpr int W_AT = STAGES*X_BYTES, RUNS_AT = W_AT + STAGES*W_BYTES, BARS_AT = RUNS_AT + 8*RUN_BYTES;
};
struct PrefillArgs { void* y; int O, M, KB, down, wide, total; float scale; int bf16, how; };   // down: tiles of a row tile; wide: those of BM tokens, of `total`

DEV uint32_t entries_f16(uint32_t v, uint32_t scale) { return half_mul(half_sub(v, 0x64806480u), scale); }   // of 1024 + 128 + entry
// weights 4s...4s+3 of both rows, as of `weights_f16`, times their scales
DEV void step_weights(uint32_t* a, const Lane& u, int s, uint32_t scale0, uint32_t scale1) {
    weights_f16<true>(a, u, s);
    if (!E4M3) {
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = entries_f16(a[i], i%2 ? scale1 : scale0);
    }
}
template<int BM, bool STEPS> DEV void half_block(float* acc, uint32_t (*a)[4], uint32_t x, const Lane& u, int half, uint32_t scale0, uint32_t scale1) {
    constexpr int N = STEPS ? 2 : 4;                                     // products that are started together; x: `matrix_low` of two boxes of BM rows x 64 columns
#pragma unroll
    for (int s = 0; s < 4; s += N) {
#pragma unroll
        for (int i = s; i < s + N; i++) step_weights(a[i], u, 4*half + i, scale0, scale1);
        wgmma_fence();
#pragma unroll
        for (int i = s; i < s + N; i++) Wgmma<BM>::run(acc, a[i], matrix_of(x + half*BM*8 + 2*i));
        wgmma_commit();
    }
}
DEV uint32_t two_of(const PrefillArgs& p, const float* v) { return p.bf16 ? floats_to_bf16(v[0]*p.scale, v[1]*p.scale) : floats_to_half2(v[0]*p.scale, v[1]*p.scale); }

// 8 tokens x 8 rows at a time, transposed: a lane then holds two rows of a token
template<int BM, bool ODD> DEV void write_tile(const PrefillArgs& p, const float* acc, int first, int row) {
    uint16_t* y = (uint16_t*)p.y + (size_t)first*p.O + row;
#pragma unroll
    for (int j = 0; j < BM/4; j++) {
        const uint32_t v = transpose(two_of(p, acc + 4*(j/2) + j%2*2));
        const int token = first + j/2*8, r = row + j%2*8;
        uint16_t* at = y + (size_t)(j/2*8)*p.O + j%2*8;
        if (token < p.M && r < p.O) {
            if (ODD) { at[0] = v & 0xffff; if (r + 1 < p.O) at[1] = v >> 16; } else *(uint32_t*)at = v;
        }
    }
}
// 16 tokens x 16 rows at a time, through the warp's own 512 bytes: a lane then holds eight rows of a token; O is a multiple of 8
DEV int run_at(int token, int half) { return 32*token + 16*(half ^ (token/4 & 1)); }   // so that eight tokens lie in different banks
template<int BM> DEV void write_runs(const PrefillArgs& p, const float* acc, uint8_t* mine, int first, int row, int lane) {
    uint8_t* put = mine + run_at(lane/16*8 + lane%8, lane/8%2);
    const uint4* get = (const uint4*)(mine + run_at(lane/2, lane%2));
    const int r = row + lane%2*8;
#pragma unroll
    for (int j = 0; j < (BM + 15)/16; j++) {
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = 16*j + i/2*8 < BM ? two_of(p, acc + 4*(2*j + i/2)%(BM/2) + i%2*2) : 0;
        store_turned(put, v); warp_sync();
        const uint4 run = *get; warp_sync();
        const int token = 16*j + lane/2;
        if (token < BM && first + token < p.M && r < p.O) *(uint4*)((uint16_t*)p.y + (size_t)(first + token)*p.O + r) = run;
    }
}
template<int BM, bool RESTS> __global__ void __launch_bounds__(384, 1) prefill(const PrefillArgs p, MAP_PARAM x_map, MAP_PARAM units_map, MAP_PARAM rest_map) {
    typedef Prefill<BM> C;
    constexpr int S = C::STAGES;
    SHARED_1024(smem);
    uint64_t *full = (uint64_t*)(smem + C::BARS_AT), *empty = full + S;
    const int group = threadIdx.x/128, warp = threadIdx.x/32, lane = threadIdx.x%32;
    const int pair = p.how & PAIR ? 1 : 0, rank = pair ? cluster_rank() : 0, first = blockIdx.x >> pair, each = gridDim.x >> pair;
    auto at_tile = [&](int tile, auto f) {                               // f(tokens of a tile, which 128 rows, first token)
        if (!RESTS || tile < p.wide) return f(Width<BM>(), (tile/p.down << pair) + rank, tile%p.down*BM);
        const int down = (p.M + REST_BM - 1)/REST_BM, i = tile - p.wide;
        f(Width<RESTS ? REST_BM : BM>(), ((p.wide/p.down + i/down) << pair) + rank, i%down*REST_BM);
    };
    if (threadIdx.x == 0) {
        for (int i = 0; i < S; i++) { bar_init(full + i, 1); bar_init(empty + i, 8 << pair); }
        if (pair) bars_made();
    }
    __syncthreads();
    if (pair) { cluster_arrive(); cluster_wait(); }
    grid_launch_next();
    int i = 0, phase = 0;                                                // the stage, and which of its barriers' two phases
    auto next = [&] { if (++i == S) { i = 0; phase ^= 1; } };
    if (group == 0) {
        fewer_registers<40>();
        int step = 0;
        if (threadIdx.x == 0) for (int tile = first; tile < p.total; tile += each) at_tile(tile, [&](auto width, int rows, int token) {
            constexpr int N = decltype(width)::tokens;
            const Map* map = RESTS && N < BM ? &rest_map : &x_map;
            for (int kb = 0; kb < p.KB; kb++, step++, next()) {
                uint8_t* at = smem + i*C::X_BYTES;
                if (step >= S) bar_wait(empty + i, phase ^ 1);
                bar_expect(full + i, N*256 + C::W_BYTES);
                units_load(smem + C::W_AT + i*C::W_BYTES, &units_map, UNIT, kb, rows*8, full + i);
                if (step == 0) grid_wait();                              // the activations are another kernel's output
                if (pair) { box_load_both(at + rank*N*128, map, kb*128 + rank*64, token, full + i); continue; }
                box_load(at, map, kb*128, token, full + i);
                box_load(at + N*128, map, kb*128 + 64, token, full + i);
            }
        });
    } else {
        more_registers<232>();
        grid_wait();
        const Remote empties = remote(empty, lane & pair);               // of the block, or one of the two, that lanes 0 and 1 give stages back to
        const uint32_t low = matrix_low(smem);
        const uint8_t* units = smem + C::W_AT + (warp - 4)*UNIT;
        for (int tile = first; tile < p.total; tile += each) at_tile(tile, [&](auto width, int rows, int token) {
            constexpr int N = decltype(width)::tokens;
            float acc[N/2];
            uint32_t a[2][4][4];
            int before = -1;                                             // the stage whose products may still run
#pragma unroll
            for (int j = 0; j < N/2; j++) acc[j] = 0.f;
            for (int kb = 0; kb < p.KB; kb++, next()) {
                const uint32_t x = shfl(low + i*(C::X_BYTES/16), 0);   // so that the compiler knows it is the same in all lanes
                const uint8_t* unit = units + i*C::W_BYTES;
                bar_wait(full + i, phase);
                warp_sync();
                Lane u; read_words(u, unit, lane); read_table(u, unit, lane, 0x80808080u);
                const uint32_t scales = E4M3 ? 0 : ((const uint32_t*)(unit + INDEX_BYTES + TABLE_BYTES))[lane/4];
                const uint32_t s0 = prmt(scales, 0, 0x1010u), s1 = prmt(scales, 0, 0x3232u);
                half_block<N, C::STEPS>(acc, a[0], x, u, 0, s0, s1);
                wgmma_wait<C::OF_A_HALF>();                              // the block before is done: its stage may be filled again
                if (before >= 0 && lane <= pair) arrive(empties, before);
                before = i;
                half_block<N, C::STEPS>(acc, a[1], x, u, 1, s0, s1);
                wgmma_wait<C::OF_A_HALF>();                              // the first half is done: its registers are free
            }
            wgmma_wait<0>();
            if (lane <= pair) arrive(empties, before);
#pragma unroll
            for (int j = 0; j < N/2; j++) pin(acc[j]);
            const int row = rows*128 + (warp - 4)*16;
            if (p.O%2) write_tile<N, true>(p, acc, token + lane/4, row + lane%4*2);
            else if (p.O%8) write_tile<N, false>(p, acc, token + lane/4, row + lane%4*2);
            else write_runs<N>(p, acc, smem + C::RUNS_AT + (warp - 4)*C::RUN_BYTES, token, row, lane);
        });
    }
    if (pair) { warp_sync(); cluster_arrive(); cluster_wait(); }         // what the other block still sends would find no one
}
#endif

// bf16 to fp16, n/8 pieces of 16 bytes; a value beyond fp16 becomes its largest number
struct HalveArgs { const void* x; void* y; int n; };
__global__ void halve(const HalveArgs p) {
    grid_launch_next(); grid_wait();
    for (int i = (blockIdx.x*blockDim.x + threadIdx.x)*8; i < p.n; i += gridDim.x*blockDim.x*8) {
        const uint4 v = load_x((const uint16_t*)p.x + i);
        *(uint4*)((uint16_t*)p.y + i) = make_uint4(bf16_as_half(v.x), bf16_as_half(v.y), bf16_as_half(v.z), bf16_as_half(v.w));
    }
}
#include "few.cuh"
#include "attend.cuh"
#include "head.cuh"
#if ARCH == 90
#include "token.cuh"
#endif

// launching ----------------------------------------------------------------------------------------------------------
typedef void (*Kernel)(const Args);
#define EACH_FEW(F) F(1, 1) F(1, 2) F(2, 1) F(2, 2) F(4, 1) F(4, 2) F(8, 1) F(8, 2)   // groups of 8 tokens, tiles of a warp
#if E4M3
#define EACH_PLANES(F)
#else
#define EACH_PLANES(F) F(1, 1) F(1, 2) F(2, 1) F(2, 2) F(4, 1) F(4, 2)   // of those by integers
#endif
#define EACH_BM(F) F(64) F(88) F(96) F(128) F(160) F(192) F(256)   // tokens of a tile of prefill
#ifdef ON_CPU
static void call(const void* kernel, void** args) {
#if ARCH == 90
#define IS(BM) || kernel == (const void*)prefill<BM, false>
    if (kernel == (const void*)prefill<256, true> EACH_BM(IS)) return ((void (*)(const PrefillArgs, const Map, const Map, const Map))kernel)(*(PrefillArgs*)args[0], *(Map*)args[1], *(Map*)args[2], *(Map*)args[3]);
#define IS_TOKEN(H, BF16) if (kernel == (const void*)token<TOKEN_MODE, H, BF16>) return token<TOKEN_MODE, H, BF16>(*(TokenArgs*)args[0], *(TokenLayout*)args[1]);
#define TOKENS(H) IS_TOKEN(H, 0) IS_TOKEN(H, 1)
    EACH_H(TOKENS)
#endif
#define ATTENDS(H) if (kernel == (const void*)attend<H>) return attend<H>(*(AttendArgs*)args[0]);
    EACH_H(ATTENDS)
#define IS_FEW_OF(NT, TJ, INT) if (kernel == (const void*)few<NT, TJ, INT>) return few<NT, TJ, INT>(*(FewArgs*)args[0], *(Map*)args[1]);
#define IS_FEW(NT, TJ) IS_FEW_OF(NT, TJ, 0)
#define IS_PLANES(NT, TJ) IS_FEW_OF(NT, TJ, 1)
    EACH_FEW(IS_FEW)
    EACH_PLANES(IS_PLANES)
#if !E4M3
#define IS_ROWS(BF16, GATED) if (kernel == (const void*)planes<BF16, GATED>) return planes<BF16, GATED>(*(RowsArgs*)args[0]);
#define IS_NORM(BF16, N) if (kernel == (const void*)norm_planes<BF16, N>) return norm_planes<BF16, N>(*(NormArgs*)args[0]);
    IS_ROWS(0, 0) IS_ROWS(0, 1) IS_ROWS(1, 0) IS_ROWS(1, 1) IS_NORM(0, 1) IS_NORM(0, 2) IS_NORM(1, 1) IS_NORM(1, 2)
#endif
    if (kernel == (const void*)halve) halve(*(HalveArgs*)args[0]);
    else if (kernel == (const void*)head) head(*(HeadArgs*)args[0]);
    else ((Kernel)kernel)(*(Args*)args[0]);
}
#endif
template<int MODE, int NT> static Kernel pick_tj(int tj) { return tj == 1 ? decode<MODE, NT, 1> : tj == 2 ? decode<MODE, NT, 2> : nullptr; }
static Kernel pick(int mode, int M, int tj) {
#if E4M3
    if (mode == FP16) return M <= 8 ? pick_tj<FP16, 1>(tj) : M <= 16 ? pick_tj<FP16, 2>(tj) : nullptr;
#else
    if (mode == INT8) return M <= 8 ? pick_tj<INT8, 1>(tj) : M <= 16 ? pick_tj<INT8, 2>(tj) : nullptr;
    if (mode == INT16) return M <= 4 ? pick_tj<INT16, 1>(tj) : M <= 8 ? pick_tj<INT16, 2>(tj) : M <= 16 ? pick_tj<INT16, 4>(tj) : nullptr;
#endif
    return nullptr;
}
// 0, a CUDA error, or -1: no such kernel, -2: too much shared memory
extern "C" int nativebit_decode(const void* units, const void* x, void* y, int O, int I, int M, float scale, int bf16, int mode, const Around* around,
                                int clusters, int ranks, int wide, int deep, int tj, int overlap, int flags, void* stream) {
    const int tiles = (O + 15)/16, KB = (I + 127)/128, rank_bits = ranks == 2 ? 1 : ranks == 4 ? 2 : ranks == 8 ? 3 : 0;
    tj = max(1, min(tj, tiles)); clusters = min(clusters, tiles/tj);     // each has TJ tiles at least
    Kernel kernel = pick(mode, M, tj);
    if ((around->norm || around->gated) && M > 1) return -1;
    if (!kernel || wide*deep < 1 || wide*deep > 16 || ranks > KB || ranks != 1 << rank_bits || (ranks > 1 && ARCH < 90) || clusters < 1 || tiles/clusters >= 32*wide*deep) return -1;
    const Layout at((tiles + clusters - 1)/clusters, (KB + ranks - 1)/ranks, M, mode == INT16 ? 2*M : M, 4*X_WORDS, ranks, deep);
    if (at.bytes > most_shared() - 1024) return -2;
    Args p = {(const uint8_t*)units, x, y, O, I, M, KB, tiles, wide, deep, rank_bits, scale, bf16, flags, *around, at};
    void* args[] = {&p};
    return launch((const void*)kernel, args, clusters*ranks, 32*wide*deep, ranks, at.bytes, overlap, stream);
}
#if ARCH == 90
// tiles: rounds of BM tokens; with REST as many as are full, and the rows that are left in tiles of REST_BM
static void share_prefill(PrefillArgs& p, int BM, int workers, int rows, bool rest) {   // rows: of a tile
    const int down = (p.M + BM - 1)/BM, tiles = (p.O + rows - 1)/rows;
    const int wide = rest ? tiles*down/workers*workers/down : tiles;
    p.down = down; p.wide = wide*down; p.total = p.wide + (rest ? (tiles - wide)*((p.M + REST_BM - 1)/REST_BM) : 0);
}
template<int BM> static int launch_prefill(PrefillArgs p, const void* units, const void* x, int I, int overlap, void* stream) {
    const int pair = p.how & PAIR ? 1 : 0;
    const bool rest = p.how & REST;
    if (rest && BM != 256) return -1;
    Map maps[3] = {};
    int e = make_map(maps, x, I, p.M, BM);
    if (!e) e = make_units_map(maps + 1, units, UNIT, p.KB, (p.O + 15)/16);
    if (!e && rest) e = make_map(maps + 2, x, I, p.M, REST_BM);
    if (e) return e;
    share_prefill(p, BM, processors() >> pair, 128 << pair, rest);
    const void* kernel = rest ? (const void*)prefill<256, true> : (const void*)prefill<BM, false>;
    void* args[] = {&p, maps, maps + 1, maps + 2};
    return launch(kernel, args, min(p.total, processors() >> pair) << pair, 384, 1 << pair, Prefill<BM>::BYTES, overlap, stream);
}
#endif
#ifdef STAMPS
static uint64_t* stamps = nullptr;                                       // where the next launch of `few` writes its own
extern "C" void nativebit_stamps(void* p) { stamps = (uint64_t*)p; }
#endif
static int eights(int M) { return M <= 8 ? 1 : M <= 16 ? 2 : M <= 32 ? 4 : 8; }   // groups of 8 tokens that `few` is compiled for
// x: fp16, or with `planes` what nativebit_planes has written; groups: of blocks that share row tiles; kb: of shared memory for a block, at most; ahead: KB of activations on their way
extern "C" int nativebit_few(const void* units, const void* x, void* y, int O, int I, int M, float scale, int bf16,
                             int groups, int ranks, int wide, int deep, int tj, int kb, int ahead, int planes, int overlap, int flags, void* stream) {
    const int tiles = (O + 15)/16, KB = (I + 127)/128, rank_bits = ranks == 2 ? 1 : ranks == 4 ? 2 : ranks == 8 ? 3 : 0, NT = eights(M);
    groups = min(groups, tiles);
    const void* kernel = nullptr;
#define PICK_FEW(N, T) if (NT == N && tj == T && !planes) kernel = (const void*)few<N, T, 0>;
#define PICK_PLANES(N, T) if (NT == N && tj == T && planes) kernel = (const void*)few<N, T, 1>;
    EACH_FEW(PICK_FEW)
    EACH_PLANES(PICK_PLANES)
    if (!kernel || M < 1 || M > 64 || I%8 || wide < 1 || (ARCH == 90 && wide%4) || deep < 1 || wide*deep > few_warps(NT, tj) || ranks > KB || ranks != 1 << rank_bits || (ranks > 1 && ARCH < 90)
        || groups < 1 || (tiles + groups - 1)/groups > wide*tj) return -1;
    const int most = min(1024*kb, most_shared());
    const Rings at((tiles + groups - 1)/groups, (KB + ranks - 1)/ranks, M, NT, deep, ranks, most, 1024*ahead, planes);
    if (at.x_slots < min(at.stages, 2) || at.bytes > most) return -2;
    FewArgs p = {(const uint8_t*)units, x, y, O, I, M, KB, tiles, wide, deep, rank_bits, scale, bf16, flags, at};
#ifdef STAMPS
    if ((p.stamps = stamps)) stamps += groups*ranks*STAMPS_OF_BLOCK;
#endif
    Map map = {};
    int e = prefer_shared(kernel);
    if (!e && ARCH >= 90 && !planes) e = make_map(&map, x, I, M, 8*NT);
    if (e) return e;
    void* args[] = {&p, &map};
    return launch(kernel, args, groups*ranks, 32*(wide*deep + FEW_COPIERS), ranks, at.bytes, overlap, stream);
}
extern "C" int nativebit_halve(const void* x, void* y, int n, int overlap, void* stream) {
    HalveArgs p = {x, y, n};
    void* args[] = {&p};
    return launch((const void*)halve, args, min((n + 2047)/2048, 8*processors()), 256, 1, 0, overlap, stream);
}
// out: ceil(I/128) blocks of NT*2080 bytes, where NT is 1, 2 or 4 groups of 8 tokens; of x, or with `up` of silu(x)·up; rows are so many numbers apart
extern "C" int nativebit_planes(const void* x, const void* up, void* out, int I, int M, int x_row, int up_row, int bf16, int overlap, void* stream) {
#if E4M3
    return -1;
#else
    if (M < 1 || M > 32 || I%8 || x_row%8 || (up && up_row%8)) return -1;
    RowsArgs p = {x, up, x_row, up_row, {(uint8_t*)out, I, M, (I + 127)/128, eights(M)}};
    void* args[] = {&p};
    const void* kernel = up ? bf16 ? (const void*)planes<1, 1> : (const void*)planes<0, 1> : bf16 ? (const void*)planes<1, 0> : (const void*)planes<0, 0>;
    return launch(kernel, args, (8*M*p.to.KB + 127)/128, 128, 1, 0, overlap, stream);
#endif
}
// the same of the norm of x + y, which is written to `both`; y may be null: then of x
extern "C" int nativebit_norm_planes(const void* x, const void* y, const void* weight, void* both, void* out, float eps, int I, int M, int x_row, int y_row, int bf16,
                                     int overlap, void* stream) {
#if E4M3
    return -1;
#else
    const int KB = (I + 127)/128, n = (8*KB + NORM_THREADS - 1)/NORM_THREADS;   // pieces of a thread
    if (M < 1 || M > 32 || I%8 || x_row%8 || (y && y_row%8) || n > 2) return -1;
    NormArgs p = {x, y, weight, both, x_row, y_row, eps, {(uint8_t*)out, I, M, KB, eights(M)}};
    void* args[] = {&p};
    const void* kernel = bf16 ? n == 1 ? (const void*)norm_planes<1, 1> : (const void*)norm_planes<1, 2> : n == 1 ? (const void*)norm_planes<0, 1> : (const void*)norm_planes<0, 2>;
    return launch(kernel, args, M, ((8*KB + n - 1)/n + 31)/32*32, 1, 4*NORM_THREADS/32, overlap, stream);
#endif
}
// x is fp16; y fp16, or bf16 where bf16 is 1; how: as of `How`
extern "C" int nativebit_prefill(const void* units, const void* x, void* y, int O, int I, int M, float scale, int bf16, int bm, int how, int overlap, void* stream) {
#if ARCH == 90
    PrefillArgs p = {y, O, M, (I + 127)/128, 0, 0, 0, scale, bf16, how};
    switch (bm) {
#define CASE(BM) case BM: return launch_prefill<BM>(p, units, x, I, overlap, stream);
        EACH_BM(CASE)
        default: return -1;
    }
#else
    return -1;
#endif
}
// q, k and v of one token, in one row, both caches (S, kv_heads, H): its key and value are added at position `at`, y is what its heads attend to;
// q_norm and k_norm: weights (H,), or null
extern "C" int nativebit_attend(const void* qkv, const void* cos, const void* sin, void* keys, void* values, const void* at, void* y,
                                const void* q_norm, const void* k_norm, float eps, int heads, int kv_heads, int H, float scale, int bf16, int ranks, int overlap, void* stream) {
#define ATTEND_OF(N) H == N ? (const void*)attend<N> :
    const void* kernel = EACH_H(ATTEND_OF) nullptr;
    if (!kernel || ranks < 1 || ranks > (ARCH < 90 ? 1 : 8)) return -1;
    AttendArgs p = {qkv, cos, sin, keys, values, (const long long*)at, y, heads, kv_heads, scale, bf16, {q_norm, k_norm, eps}};
    void* args[] = {&p};
    return launch(kernel, args, heads*ranks, ATTEND_THREADS, ranks, attend_bytes(H, ranks), overlap, stream);
}
// y (V,) float: x (D,) times the rows of an int8 table (V, D), times a scale (V,) each
extern "C" int nativebit_head(const void* table, const void* scales, const void* x, void* y, int V, int D, int bf16, int overlap, void* stream) {
    if (D%16 || head_bytes(D) > 48*1024) return -1;
    HeadArgs p = {(const uint8_t*)table, (const float*)scales, x, (float*)y, V, D, bf16};
    void* args[] = {&p};
    return launch((const void*)head, args, min((V + 31)/32, 4*processors()), HEAD_THREADS, 1, head_bytes(D), overlap, stream);
}
#if ARCH == 90
// all layers of a network and the last norm, for one token; what matrices hold is split into m[].ranks parts of the input, one for q k v and for gate, up
extern "C" int nativebit_token(const TokenArgs* args, int ctas, int warps, void* stream) {
    constexpr int mode = TOKEN_MODE, rows = E4M3 ? 1 : 2;
    TokenArgs p = *args;
    const void* kernel = pick_token<mode>(p.H, p.bf16);
    if (!kernel || warps < 1 || warps > 16 || p.m[0].ranks != 1 || p.m[2].ranks != 1 || p.m[1].ranks > ctas || p.m[3].ranks > ctas || max(p.m[1].ranks, p.m[3].ranks) > MOST_PARTS || p.splits > MOST_SPLITS || p.n_heads*p.splits > ctas || p.D%8 || p.F%8) return -1;
    if (p.m[2].tiles < ctas) return -6;                                  // every block has to send some gate and up
#ifndef ON_CPU
    if (warps%4) return -5;                                              // registers move between groups of four warps
#endif
    p.slots = 0;
    p.slots = min(16*(warps + COPIERS), (232448 - 2048 - TokenLayout(p, ctas, warps, rows).bytes)/(PIECE*UNIT + 16));
    if (args->slots) p.slots = min(p.slots, args->slots);
    int most = 0;                                                        // pieces of a stage; where one slot holds two of them, both must be the same warp's
    for (const Matrix& m : p.m) most = max(most, (m.tiles + ctas/m.ranks - 1)/(ctas/m.ranks)*(((m.KB + m.ranks - 1)/m.ranks + PIECE - 1)/PIECE));
    if (p.slots < most) p.slots -= p.slots%warps;
    TokenLayout at(p, ctas, warps, rows);
    if (p.slots < min(most, warps) || at.bytes > 232448 - 1024) return -2;
    void* a[] = {&p, &at};
    return launch(kernel, a, ctas, 32*(warps + COPIERS), 0, at.bytes, 0, stream);
}
#endif
extern "C" int nativebit_arch() { return ARCH; }
extern "C" int nativebit_unit_bytes() { return UNIT; }
