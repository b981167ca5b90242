// cc -O2 -ftree-vectorize -std=gnu11 -fopenmp-simd -fno-math-errno -Wno-psabi -fPIC -shared -pthread
// Products with packed matrices on a CPU, and a decoder made of them. Explained in nbs/09_kernels/09_cpu.ipynb.
// The same source is compiled for several instruction sets (cpu_isa.h, once each); which one runs is decided
// when the library is asked (nb_select). Called through ctypes: plain C functions and structures only.
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

enum { PACKED, F32, BF16, I8, I6, I4 };             // how a matrix is held
enum { INT8, E4M3, FLOAT32, FLOAT16 };               // how a codebook's entries are stored
enum { FLOAT = 0, ONE_PLANE = 1, TWO_PLANES = 2, AUTO = 3 };   // what activations become: floats, 8 bits, 8 + 8 bits, either
enum { SEG = 64 };                                   // columns that share a scale of activations

// A matrix (rows, cols). Packed ones: tiles of `64/C` rows; of a tile, for each 64 columns of a block, the indices
// of its rows (`nb_layout`), and for each block of columns a table of int8 entries and scales.
typedef struct {
    int64_t rows, cols, tiles, groups, blocks;       // groups: of 64 columns; blocks: of columns
    int32_t form, bits, shared, half;                // shared: a tile has one table; half: scales are float16, else bfloat16
    int32_t block_rows, block_cols, n_entries, kind; // as in the file
    uint8_t *words; int8_t *tables; uint16_t *scales;
    const void *codes, *code_scales;                 // the file's entries: the exact path reads them
    const void *data; const float *row_scales;       // of a matrix that is not packed
} matrix;

// Activations, ready to be multiplied: as floats and, for what computes in integers, as 8-bit planes.
typedef struct {
    int64_t n, ld, groups; int32_t planes;
    float *x;                                        // (n, ld), zeros beyond the columns
    int8_t *q; float *scale; int32_t *sum;           // of n·planes rows, a number (scale, sum) or 64 (q) a group: where `acts_at` says
    int8_t *r; float *rscale; int32_t *rsum;         // (n, 2, ld), (n, 2) both: whole tokens in two planes, for rows of bytes
} acts;

typedef struct { matrix q, k, v, o, gate, up, down; const float *bias[7], *attn_norm, *mlp_norm, *q_norm, *k_norm; } layer;

typedef struct {
    int32_t n_layers, D, N, Nkv, H, F, V, mode;      // mode: of matrices that are packed
    float eps; int32_t qk_norm;
    layer *layers; matrix *embed, *head; const float *norm, *cosines, *sines;   // (positions, H/2)
    float *keys, *values; int64_t capacity;          // (layers, Nkv, capacity/32, H, 32), (layers, Nkv, capacity, Hp)
} model;

#define ROUND(n, m) (((n) + (m) - 1)/(m)*(m))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline, unused))

static inline int columns_of(int bits) { return bits == 2 ? 4 : bits == 3 ? 8 : 16; }   // of a vector of 64 indices
static inline int rows_of(int bits) { return SEG/columns_of(bits); }                    // of a tile

static inline int vectors_of(int bits) { return 6 - bits; }                              // that 64 columns of a tile take
static inline int group_bytes(int bits) { return SEG*vectors_of(bits); }

static inline float bits_float(uint32_t b) { float f; memcpy(&f, &b, 4); return f; }
static inline uint32_t float_bits(float f) { uint32_t b; memcpy(&b, &f, 4); return b; }
static inline float bf16_float(uint16_t h) { return bits_float((uint32_t)h << 16); }
static inline float half_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023;
    if (e == 31) return bits_float(sign | 0x7f800000 | m << 13);
    float f = e ? bits_float((e + 112) << 23 | m << 13) : (float)m*0x1p-24f;
    return sign ? -f : f;
}
static inline float e4m3_float(uint8_t b) {
    int e = b >> 3 & 15, m = b & 7;
    float f = (b & 127) == 127 ? NAN : e ? bits_float((uint32_t)(e + 120) << 23 | (uint32_t)m << 20) : (float)m*0x1p-9f;
    return b & 128 ? -f : f;
}
static inline float scale_float(const matrix *m, uint16_t s) { return m->half ? half_float(s) : bf16_float(s); }

// Rows of activations are multiplied in chunks of 16, then 4, 2 and 1. A chunk's rows lie side by side, group after group: 16 rows that are
// 8,192 numbers apart would all want the same few lines of the cache.
static inline int64_t chunk_of(int64_t left) { return left >= 16 ? 16 : left >= 4 ? 4 : left >= 2 ? 2 : 1; }

static inline int64_t acts_at(const acts *a, int64_t row, int64_t g) {
    for (int64_t first = 0, count = a->n*a->planes, M;; first += (count - first)/M*M) {
        M = chunk_of(count - first);
        int64_t begin = first + (row - first)/M*M;
        if (begin + M <= count) return begin*a->groups + g*M + row - begin;
    }
}

static inline int64_t block_groups(const matrix *m, int64_t j) {   // groups of 64 columns in block column j
    int64_t width = MIN((int64_t)m->block_cols, m->cols - j*m->block_cols);
    return ROUND(width, SEG)/SEG;
}

// The file's entry k of a block, as a float.
static float file_entry(const matrix *m, int64_t block, int k) {
    int64_t at = block*m->n_entries + k;
    switch (m->kind) {
        case INT8: return ((const int8_t *)m->codes)[at]*half_float(((const uint16_t *)m->code_scales)[block]);
        case E4M3: return e4m3_float(((const uint8_t *)m->codes)[at])*((const float *)m->code_scales)[0];
        case FLOAT16: return half_float(((const uint16_t *)m->codes)[at]);
        default: { float f; memcpy(&f, (const float *)m->codes + at, 4); return f; }
    }
}

// All of a block's.
static void file_table(const matrix *m, int64_t block, float *e) {
    int K = m->n_entries;
    const uint8_t *codes = (const uint8_t *)m->codes + block*K;
    if (m->kind == INT8) { float s = half_float(((const uint16_t *)m->code_scales)[block]); for (int k = 0; k < K; k++) e[k] = (int8_t)codes[k]*s; }
    else if (m->kind == E4M3) { float s = ((const float *)m->code_scales)[0]; for (int k = 0; k < K; k++) e[k] = e4m3_float(codes[k])*s; }
    else for (int k = 0; k < K; k++) e[k] = file_entry(m, block, k);
}

// ---- the layout ------------------------------------------------------------------------------------------------

static uint32_t spread(uint32_t v, uint64_t *out) {   // 8 nibbles to 8 bytes
    uint64_t x = v;
    x = (x | x << 16) & 0x0000ffff0000ffffull; x = (x | x << 8) & 0x00ff00ff00ff00ffull;
    *out = (x | x << 4) & 0x0f0f0f0f0f0f0f0full;
    return v;
}

// 32 indices of the file, as bytes.
static void unpack32(const uint32_t *w, int bits, uint8_t *out) {
    uint32_t s[4];
    if (bits == 2) for (int i = 0; i < 4; i++) s[i] = w[i/2] >> 2*(i % 2) & 0x33333333u;
    else if (bits == 4) memcpy(s, w, 16);
    else {
        for (int i = 0; i < 3; i++) s[i] = w[i] & 0x77777777u;
        s[3] = (w[0] >> 3 & 0x11111111u) | (w[1] >> 2 & 0x22222222u) | (w[2] >> 1 & 0x44444444u);
    }
    for (int i = 0; i < 4; i++) { uint64_t b; spread(s[i], &b); memcpy(out + 8*i, &b, 8); }
}

// `n` indices from position `at` on.
static void unpack_range(const uint32_t *words, int bits, int64_t at, int64_t n, uint8_t *out) {
    uint8_t b[32];
    for (int64_t end = at + n; at < end;) {
        int64_t g = at/32, skip = at % 32, take = MIN(32 - skip, end - at);
        unpack32(words + g*bits, bits, b);
        memcpy(out, b + skip, take);
        out += take; at += take;
    }
}

// 64 columns of a tile: vectors of 64 indices (rows side by side, C columns each) folded into `vectors_of(bits)`.
static void fold_group(uint8_t idx[16][SEG], int bits, uint8_t *out) {
    int C = columns_of(bits), R = rows_of(bits), n = SEG/C;
    uint8_t v[16][SEG];
    for (int k = 0; k < n; k++) for (int r = 0; r < R; r++) memcpy(v[k] + r*C, idx[r] + k*C, C);
    for (int i = 0; i < SEG; i++) {
        if (bits == 2) for (int k = 0; k < 4; k++)
            out[k*SEG + i] = v[4*k][i] | v[4*k+1][i] << 2 | v[4*k+2][i] << 4 | v[4*k+3][i] << 6;
        else if (bits == 4) for (int k = 0; k < 2; k++) out[k*SEG + i] = v[2*k][i] | v[2*k+1][i] << 4;
        else {
            uint8_t s = v[6][i] | v[7][i] << 4;
            out[i]         = v[0][i] | v[1][i] << 4 | (s & 0x11) << 3;
            out[SEG + i]   = v[2][i] | v[3][i] << 4 | (s & 0x22) << 2;
            out[2*SEG + i] = v[4][i] | v[5][i] << 4 | (s & 0x44) << 1;
        }
    }
}

// What a whole matrix is multiplied by.
static inline float factor_of(const matrix *m) { return m->kind == E4M3 ? ((const float *)m->code_scales)[0] : 1; }

// A block's table in int8: its own codes, or other numbers rounded with a scale that bfloat16 holds. Of twenty scales it is
// the one that rounds them least: entries of float8 have four significant bits, and some scale often suits them all.
static void make_table(const matrix *m, int64_t block, int8_t *table, uint16_t *scale) {
    int K = 1 << m->bits;
    memset(table, 0, K);
    if (m->kind == INT8) {
        memcpy(table, (const int8_t *)m->codes + block*m->n_entries, m->n_entries);
        *scale = ((const uint16_t *)m->code_scales)[block];
        return;
    }
    float top = 0, e[16];
    for (int k = 0; k < m->n_entries; k++) {
        e[k] = m->kind == E4M3 ? e4m3_float(((const uint8_t *)m->codes)[block*m->n_entries + k]) : file_entry(m, block, k);
        top = fmaxf(top, fabsf(e[k]));
    }
    float least = INFINITY;
    for (int n = 127; n > 67; n -= 3) {
        uint16_t half = (uint16_t)((float_bits(top/n) + 0xffff) >> 16);
        float s = bf16_float(half), off = 0, inv = s > 0 ? 1/s : 0;
        for (int k = 0; k < m->n_entries; k++) { float d = e[k] - s*rintf(e[k]*inv); off += d*d; }
        if (off < least) { least = off; *scale = half; }
    }
    if (least == INFINITY) *scale = 0;
    float s = bf16_float(*scale);
    if (s > 0) for (int k = 0; k < m->n_entries; k++) table[k] = (int8_t)MAX(-127, MIN(127, (int)lrintf(e[k]/s)));
}

// How many bytes a matrix of this geometry takes: words, tables, scales. Fills in tiles, groups, blocks, shared.
void nb_measure(matrix *m, int64_t *sizes) {
    int R = rows_of(m->bits), K = 1 << m->bits;
    m->tiles = ROUND(m->rows, R)/R;
    m->blocks = ROUND(m->cols, (int64_t)m->block_cols)/m->block_cols;
    m->groups = 0;
    for (int64_t j = 0; j < m->blocks; j++) m->groups += block_groups(m, j);
    m->shared = m->block_rows % R == 0;
    m->half = m->kind == INT8;
    sizes[0] = m->tiles*m->groups*group_bytes(m->bits);
    sizes[1] = m->tiles*m->blocks*(m->shared ? K : SEG);
    sizes[2] = m->tiles*m->blocks*(m->shared ? 1 : R)*2;
}

// Lay out the tiles from `begin` to `end` of a matrix whose indices the file has in `words`.
void nb_layout(const matrix *m, const uint32_t *words, int64_t begin, int64_t end) {
    int R = rows_of(m->bits), K = 1 << m->bits, bo = m->block_rows, bi = m->block_cols;
    for (int64_t t = begin; t < end; t++) {
        uint8_t *out = m->words + t*m->groups*group_bytes(m->bits);
        for (int64_t j = 0; j < m->blocks; j++) {
            int64_t width = MIN((int64_t)bi, m->cols - j*bi), at = t*m->blocks + j;
            for (int r = 0; r < (m->shared ? 1 : R); r++) {
                int64_t row = t*R + r, block = row/bo*m->blocks + j;
                int8_t *table = m->tables + (m->shared ? at*K : at*SEG + r*K);
                uint16_t *scale = m->scales + (m->shared ? at : at*R + r);
                if (row < m->rows) make_table(m, block, table, scale);
                else { memset(table, 0, K); *scale = 0; }
            }
            for (int64_t c = 0; c < width; c += SEG) {
                uint8_t idx[16][SEG];
                memset(idx, 0, sizeof idx);
                for (int r = 0; r < R; r++) {
                    int64_t row = t*R + r, block = row/bo*m->blocks + j;
                    if (row < m->rows)
                        unpack_range(words, m->bits, block*bo*bi + row % bo*bi + c, MIN((int64_t)SEG, width - c), idx[r]);
                }
                fold_group(idx, m->bits, out);
                out += group_bytes(m->bits);
            }
        }
    }
}

// ---- threads ---------------------------------------------------------------------------------------------------

typedef struct {
    int n; pthread_t *threads; long spins, yields; pthread_mutex_t one;   // job at a time
#if defined(__linux__)
    cpu_set_t cores;
#endif
    int bind;
    void (*job)(void *, int, int); void *with;
    atomic_int round, arrived, barrier, asleep, quit;
} pool;

static void rest(void) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Wait until `*word` is no longer `old`: a few microseconds in a circle, then letting others on this core go first
// (who is waited for may be one of them), then asleep.
static void wait_change(pool *p, atomic_int *word, int old) {
    for (long i = 0; i < p->spins; i++) { if (atomic_load_explicit(word, memory_order_acquire) != old) return; rest(); }
    for (long i = 0; i < p->yields; i++) { if (atomic_load_explicit(word, memory_order_acquire) != old) return; sched_yield(); }
    atomic_fetch_add(&p->asleep, 1);
    while (atomic_load(word) == old) {
#if defined(__linux__)
        syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
#else
        struct timespec t = {0, 50000}; nanosleep(&t, NULL);
#endif
    }
    atomic_fetch_sub(&p->asleep, 1);
}

static void change(pool *p, atomic_int *word) {
    atomic_fetch_add(word, 1);
#if defined(__linux__)
    if (atomic_load(&p->asleep)) syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1 << 30, NULL, NULL, 0);
#endif
}

static void meet(pool *p) {   // all threads of a job
    if (p->n == 1) return;
    int now = atomic_load(&p->barrier);
    if (atomic_fetch_add(&p->arrived, 1) == p->n - 1) { atomic_store(&p->arrived, 0); change(p, &p->barrier); }
    else wait_change(p, &p->barrier, now);
}

// Thread i stays on the i-th core that this process may use: a scheduler sees threads that wait for each other as
// idle and puts them on one core. The caller's own thread is free again after each job.
static void stay(const pool *p, int i) {
#if defined(__linux__)
    if (p->bind && CPU_COUNT(&p->cores) >= p->n) for (int c = 0, k = 0; c < CPU_SETSIZE; c++) if (CPU_ISSET(c, &p->cores) && k++ == i) {
        cpu_set_t one;
        CPU_ZERO(&one); CPU_SET(c, &one);
        sched_setaffinity(0, sizeof one, &one);
    }
#endif
}

typedef struct { pool *p; int i; } seat;

static void *worker(void *arg) {
    seat s = *(seat *)arg;
    free(arg);
    stay(s.p, s.i);
    for (int round = 0;; round++) {
        wait_change(s.p, &s.p->round, round);
        if (atomic_load(&s.p->quit)) return NULL;
        s.p->job(s.p->with, s.i, s.p->n);
        meet(s.p);
    }
}

pool *nb_pool(int n, int bind) {
    pool *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    p->bind = bind;
#if defined(__linux__)
    if (sched_getaffinity(0, sizeof p->cores, &p->cores)) p->bind = 0;
#endif
    p->n = 1; p->spins = bind ? 2000 : 50; p->yields = 100;
    pthread_mutex_init(&p->one, NULL);
    p->threads = calloc(n, sizeof *p->threads);
    int want = n;
    for (int i = 1; p->threads && i < want; i++) {
        seat *s = malloc(sizeof *s);
        if (!s) break;
        *s = (seat){p, i};
        if (pthread_create(&p->threads[i], NULL, worker, s)) { free(s); break; }
        p->n = i + 1;
    }
    return p;
}

int nb_threads(const pool *p) { return p->n; }

void nb_pool_end(pool *p) {
    atomic_store(&p->quit, 1);
    change(p, &p->round);
    for (int i = 1; i < p->n; i++) pthread_join(p->threads[i], NULL);
    free(p->threads); free(p);
}

static void together(pool *p, void (*job)(void *, int, int), void *with) {
    if (p->n == 1) { job(with, 0, 1); return; }
    pthread_mutex_lock(&p->one);
    p->job = job; p->with = with;
    stay(p, 0);
    change(p, &p->round);
    job(with, 0, p->n);
    meet(p);
#if defined(__linux__)
    if (p->bind) sched_setaffinity(0, sizeof p->cores, &p->cores);
#endif
    pthread_mutex_unlock(&p->one);
}

// Rows (a multiple of 16 at every cut) of thread i.
static void band(int64_t rows, int i, int n, int64_t *begin, int64_t *end) {
    int64_t parts = ROUND(rows, 16)/16;
    *begin = MIN(rows, parts*i/n*16); *end = MIN(rows, parts*(i + 1)/n*16);
}

// ---- instruction sets ------------------------------------------------------------------------------------------

typedef struct {
    const char *name;
    void (*prepare)(acts *, const matrix *, int64_t, int64_t);
    void (*multiply)(const matrix *, const acts *, int64_t, int64_t, float *, int64_t, float *);
    void (*panel)(const matrix *, int64_t, int64_t, float *, int64_t);
    void (*norm)(const float *, const float *, float, int64_t, float *);
    void (*gate)(const float *, const float *, int64_t, float *);
    void (*attend)(const model *, int64_t, const float *, int64_t, int64_t, int, int, int, float *, float *);
} isa;

#define ISA_SCALAR 1
#define NAME(f) f##_scalar
#include "cpu_isa.h"
#undef NAME
#undef ISA_SCALAR

#if defined(__x86_64__)
#define ISA_AVX2 1
#define NAME(f) f##_avx2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif
#include "cpu_isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef NAME
#undef ISA_AVX2
#define ISA_AVX512 1
#define NAME(f) f##_avx512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,prefer-vector-width=512")
#endif
#include "cpu_isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef NAME
#undef ISA_AVX512
#endif

#if defined(__aarch64__)
#define ISA_NEON 1
#define NAME(f) f##_neon
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include "cpu_isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef NAME
#undef ISA_NEON
#endif

static const isa *there[4];
static int n_there;
static const isa *now;

static void look(void) {
    if (n_there) return;
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    if (avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni")) there[n_there++] = &isa_avx512;
    if (avx2) there[n_there++] = &isa_avx2;
#elif defined(__aarch64__)
#if defined(__linux__)
    if (getauxval(AT_HWCAP) & 1 << 20) there[n_there++] = &isa_neon;
#else
    there[n_there++] = &isa_neon;
#endif
#endif
    there[n_there++] = &isa_scalar;
    now = there[0];
}

// The names of what this CPU has, the fastest first; NULL after the last.
const char *nb_isa(int i) { look(); return i < n_there ? there[i]->name : NULL; }

// Choose one by name. 0: there is none of it.
int nb_select(const char *name) {
    look();
    for (int i = 0; i < n_there; i++) if (!strcmp(there[i]->name, name)) { now = there[i]; return 1; }
    return 0;
}

// ---- activations -----------------------------------------------------------------------------------------------

// Planes for `n` tokens: memory is what one token waits for, and a second plane costs it nothing.
static int planes_of(int mode, int64_t n) { return mode == AUTO ? n == 1 ? TWO_PLANES : ONE_PLANE : mode; }

static int64_t padded(int64_t n) { return ROUND(n, SEG); }

static void free_acts(acts *a) {
    free(a->x); free(a->q); free(a->scale); free(a->sum); free(a->r); free(a->rscale); free(a->rsum);
    memset(a, 0, sizeof *a);
}

static void *aligned(int64_t bytes) { return aligned_alloc(64, ROUND(MAX(bytes, 1), 64)); }

// Room for `n` tokens of any matrix with up to `cols` columns in `groups` groups. 0: no memory.
static int new_acts(acts *a, int64_t n, int64_t cols, int64_t groups, int planes) {
    int64_t ld = padded(cols), p = n*MAX(planes, 1);
    *a = (acts){.n = n, .ld = ld, .groups = groups, .planes = planes,
        .x = aligned(4*n*ld), .q = aligned(p*groups*SEG), .scale = aligned(4*p*groups), .sum = aligned(4*p*groups),
        .r = aligned(2*n*ld), .rscale = aligned(8*n), .rsum = aligned(8*n)};
    if (a->x && a->q && a->scale && a->sum && a->r && a->rscale && a->rsum) return 1;
    free_acts(a);
    return 0;
}

// Copy tokens in and make of them what `m` multiplies.
static void take(acts *a, const matrix *m, const float *x, int64_t ldx, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
        if (x) memcpy(a->x + t*a->ld, x + t*ldx, 4*m->cols);
        memset(a->x + t*a->ld + m->cols, 0, 4*(a->ld - m->cols));
    }
    now->prepare(a, m, begin, end);
}

static int64_t panel_floats(const matrix *m) { return 16*padded(m->cols); }

// ---- one product -----------------------------------------------------------------------------------------------

typedef struct { pool *p; const matrix *m; acts a; const float *x; float *y; int64_t n; float **scratch; } product;

static void product_job(void *with, int i, int n) {
    product *w = with;
    int64_t begin, end;
    take(&w->a, w->m, w->x, w->m->cols, w->n*i/n, w->n*(i + 1)/n);
    meet(w->p);
    band(w->m->rows, i, n, &begin, &end);
    for (int64_t t = 0; t < w->n; t++) memset(w->y + t*w->m->rows + begin, 0, 4*(end - begin));
    now->multiply(w->m, &w->a, begin, end, w->y, w->m->rows, w->scratch[i]);
}

// y (n, rows) = x (n, cols) Wᵀ. -1: there is no memory for it.
int nb_matmul(pool *p, const matrix *m, const float *x, float *y, int64_t n, int mode) {
    look();
    product w = {p, m, .x = x, .y = y, .n = n};
    int ok = new_acts(&w.a, n, m->cols, m->form == PACKED ? m->groups : padded(m->cols)/SEG, planes_of(mode, n));
    float **scratch = calloc(p->n, sizeof *scratch);
    for (int i = 0; scratch && i < p->n; i++) ok = (scratch[i] = aligned(4*panel_floats(m))) && ok;
    w.scratch = scratch;
    if (ok && scratch) { w.a.ld = padded(m->cols); together(p, product_job, &w); }
    for (int i = 0; scratch && i < p->n; i++) free(scratch[i]);
    free(scratch);
    free_acts(&w.a);
    return ok && w.scratch ? 0 : -1;
}

// Rows of a matrix, in float32.
void nb_rows(const matrix *m, const int64_t *rows, int64_t n, float *out) {
    look();
    int64_t ld = padded(m->cols);
    float *row = aligned(4*16*ld);
    for (int64_t i = 0; row && i < n; i++) { now->panel(m, rows[i], 1, row, ld); memcpy(out + i*m->cols, row, 4*m->cols); }
    free(row);
}

// All rows of a matrix, in float32, by all threads.
typedef struct { const matrix *m; float *out; } whole;
static void whole_job(void *with, int i, int n) {
    whole *w = with;
    int64_t begin, end, cols = w->m->cols, ld = padded(cols);
    band(w->m->rows, i, n, &begin, &end);
    if (ld == cols) { now->panel(w->m, begin, end - begin, w->out + begin*cols, ld); return; }
    for (float row[1024]; begin < end; begin++) {
        float *to = ld <= 1024 ? row : aligned(4*ld);
        if (!to) return;
        now->panel(w->m, begin, 1, to, ld);
        memcpy(w->out + begin*cols, to, 4*cols);
        if (to != row) free(to);
    }
}
void nb_whole(pool *p, const matrix *m, float *out) { look(); whole w = {m, out}; together(p, whole_job, &w); }

typedef struct { const matrix *m; const uint32_t *words; } laying;
static void layout_job(void *with, int i, int n) {
    laying *w = with;
    nb_layout(w->m, w->words, w->m->tiles*i/n, w->m->tiles*(i + 1)/n);
}
void nb_layout_all(pool *p, const matrix *m, const uint32_t *words) { laying w = {m, words}; together(p, layout_job, &w); }

// A sum over bytes, by all threads: how fast this machine reads.
typedef struct { const uint64_t *x; int64_t n; uint64_t *sums; } reading;
static void read_job(void *with, int i, int n) {
    reading *w = with;
    uint64_t s[8] = {0};
    for (int64_t k = w->n/8*i/n*8; k < w->n/8*(i + 1)/n*8; k += 8) for (int j = 0; j < 8; j++) s[j] += w->x[k + j];
    for (int j = 1; j < 8; j++) s[0] += s[j];
    w->sums[8*i] = s[0];
}
uint64_t nb_read(pool *p, const void *x, int64_t bytes) {
    uint64_t sums[8*256] = {0};
    reading w = {x, bytes/8, sums};
    together(p, read_job, &w);
    for (int i = 1; i < p->n; i++) sums[0] += sums[8*i];
    return sums[0];
}

// ---- the decoder -----------------------------------------------------------------------------------------------

typedef struct {
    pool *p; const model *m; const int64_t *tokens; int64_t n, start, outs; float *logits; int alone;   // one token
    const model *const *each; const int64_t *starts;    // of each token, where they are of different texts
    float *x, *q, *k, *v, *y, *g, *u; int64_t Hp;       // (n, …) each
    acts shared, *own; float **scratch, **scores;
} step;

// What a product reads: one token is prepared by each thread for itself, more of them by all together.
static const acts *ready(step *s, int i, int n, const matrix *m, const float *from, int64_t ld, const float *norm) {
    acts *a = s->alone ? &s->own[i] : &s->shared;
    int64_t begin = s->alone ? 0 : s->n*i/n, end = s->alone ? 1 : s->n*(i + 1)/n, pad = padded(m->cols);
    for (int64_t t = begin; norm && t < end; t++) now->norm(from + t*ld, norm, s->m->eps, m->cols, a->x + t*pad);
    if (i == 0 || s->alone) { a->n = s->n; a->ld = pad; a->groups = m->form == PACKED ? m->groups : pad/SEG; }
    if (!s->alone) meet(s->p);
    take(a, m, norm ? NULL : from, ld, begin, end);
    if (!s->alone) meet(s->p);
    return a;
}

static int same_form(const matrix *a, const matrix *b) {
    return (a->form == PACKED) == (b->form == PACKED) && (a->form != PACKED || (a->groups == b->groups
            && (a->block_cols == b->block_cols || (a->block_cols % SEG == 0 && b->block_cols % SEG == 0))))
           && (a->form >= I8) == (b->form >= I8);
}

// This thread's rows of y (+)= x Wᵀ + bias.
static void rows_job(step *s, int i, int n, const matrix *m, const acts *a, const float *bias, float *y, int64_t ld, int add) {
    int64_t begin, end;
    band(m->rows, i, n, &begin, &end);
    for (int64_t t = 0; !add && t < s->n; t++) {
        if (bias) memcpy(y + t*ld + begin, bias + begin, 4*(end - begin));
        else memset(y + t*ld + begin, 0, 4*(end - begin));
    }
    for (int64_t t = 0; add && bias && t < s->n; t++) for (int64_t r = begin; r < end; r++) y[t*ld + r] += bias[r];
    now->multiply(m, a, begin, end, y, ld, s->scratch[i]);
}

static void turn(float *x, const float *c, const float *s, int half) {
    for (int j = 0; j < half; j++) {
        float a = x[j], b = x[j + half];
        x[j] = a*c[j] - b*s[j]; x[j + half] = b*c[j] + a*s[j];
    }
}

static const model *cache_of(const step *s, int64_t t) { return s->each ? s->each[t] : s->m; }
static int64_t place_of(const step *s, int64_t t) { return s->each ? s->starts[t] : s->start + t; }

// Norm and turn queries and keys; write keys and values into the cache.
static void turn_job(step *s, int l, int i, int n) {
    const model *m = s->m; const layer *w = &m->layers[l];
    int64_t all = s->n*(m->N + m->Nkv);
    for (int64_t item = all*i/n; item < all*(i + 1)/n; item++) {
        int64_t t = item/(m->N + m->Nkv), h = item % (m->N + m->Nkv), at = place_of(s, t);
        const model *c = cache_of(s, t);
        float *x = h < m->N ? s->q + (t*m->N + h)*m->H : s->k + (t*m->Nkv + h - m->N)*m->H;
        if (m->qk_norm) now->norm(x, h < m->N ? w->q_norm : w->k_norm, m->eps, m->H, x);
        turn(x, c->cosines + at*(m->H/2), c->sines + at*(m->H/2), m->H/2);
        if (h < m->N) continue;
        int64_t kv = (int64_t)l*m->Nkv + h - m->N;
        float *keys = c->keys + (kv*c->capacity + at/32*32)*m->H + at % 32;
        for (int j = 0; j < m->H; j++) keys[32*j] = x[j];
        memcpy(c->values + (kv*c->capacity + at)*s->Hp, s->v + (t*m->Nkv + h - m->N)*m->H, 4*m->H);
    }
}

// Up to 4 queries that meet the same keys, at a time: of one token those of a group of heads, else 4 tokens of a head.
static void attention_job(step *s, int l, int i, int n) {
    const model *m = s->m;
    int64_t group = m->N/m->Nkv, H = m->H, row = (int64_t)m->N*H, first = (int64_t)l*m->Nkv;
    if (s->alone || s->each) {
        int64_t parts = (group + 3)/4, heads = parts*m->Nkv;
        for (int64_t item = i; item < s->n*heads; item += n) {
            int64_t t = item/heads, kv = item % m->Nkv, part = item % heads/m->Nkv*4, at = t*row + (kv*group + part)*H;
            now->attend(cache_of(s, t), first + kv, s->q + at, H, place_of(s, t), 0, (int)MIN(4, group - part), (int)s->Hp,
                        s->scores[i], s->y + at);
        }
    } else for (int64_t item = i; item < ROUND(s->n, 4)/4*m->N; item += n) {
        int64_t t = item/m->N*4, h = item % m->N;
        now->attend(m, first + h/group, s->q + t*row + h*H, row, s->start + t, 1, (int)MIN(4, s->n - t), (int)s->Hp,
                    s->scores[i], s->y + t*row + h*H);
    }
}

static void step_job(void *with, int i, int n) {
    step *s = with; const model *m = s->m;
    int64_t D = m->D, q = (int64_t)m->N*m->H, kv = (int64_t)m->Nkv*m->H;
    for (int64_t t = s->n*i/n; t < s->n*(i + 1)/n; t++) nb_rows(m->embed, s->tokens + t, 1, s->x + t*D);
    meet(s->p);
    for (int l = 0; l < m->n_layers; l++) {
        const layer *w = &m->layers[l];
        const matrix *ins[3] = {&w->q, &w->k, &w->v}; float *outs[3] = {s->q, s->k, s->v};
        const acts *a = NULL;
        for (int j = 0; j < 3; j++) {
            if (!a || !same_form(ins[j-1], ins[j])) {
                if (a && !s->alone) meet(s->p);
                a = ready(s, i, n, ins[j], s->x, D, w->attn_norm);
            }
            rows_job(s, i, n, ins[j], a, w->bias[j], outs[j], j ? kv : q, 0);
        }
        meet(s->p);
        turn_job(s, l, i, n);
        meet(s->p);
        attention_job(s, l, i, n);
        meet(s->p);
        a = ready(s, i, n, &w->o, s->y, q, NULL);
        rows_job(s, i, n, &w->o, a, w->bias[3], s->x, D, 1);
        meet(s->p);
        a = ready(s, i, n, &w->gate, s->x, D, w->mlp_norm);
        rows_job(s, i, n, &w->gate, a, w->bias[4], s->g, m->F, 0);
        if (!same_form(&w->gate, &w->up)) {
            if (!s->alone) meet(s->p);
            a = ready(s, i, n, &w->up, s->x, D, w->mlp_norm);
        }
        rows_job(s, i, n, &w->up, a, w->bias[5], s->u, m->F, 0);
        int64_t begin, end;
        band(m->F, i, n, &begin, &end);
        for (int64_t t = 0; t < s->n; t++) now->gate(s->g + t*m->F + begin, s->u + t*m->F + begin, end - begin, s->g + t*m->F + begin);
        meet(s->p);
        a = ready(s, i, n, &w->down, s->g, m->F, NULL);
        rows_job(s, i, n, &w->down, a, w->bias[6], s->x, D, 1);
        meet(s->p);
    }
    if (!s->outs) return;
    // the head, of the last `outs` tokens
    float *x = s->x + (s->n - s->outs)*D;
    meet(s->p);
    if (i == 0) s->n = s->outs;
    meet(s->p);
    const acts *a = ready(s, i, n, m->head, x, D, m->norm);
    rows_job(s, i, n, m->head, a, NULL, s->logits, m->V, 0);
}

static int forward(step s) {
    look();
    pool *p = s.p; const model *m = s.m;
    int64_t n = s.n, q = (int64_t)m->N*m->H, kv = (int64_t)m->Nkv*m->H, cols = MAX(MAX(m->D, m->F), q), groups = padded(cols)/SEG, wide = 0, last = 0;
    for (int64_t t = 0; t < n; t++) last = MAX(last, place_of(&s, t));
    for (int l = 0; l < m->n_layers; l++) for (int j = 0; j < 7; j++) {
        const matrix *w = &m->layers[l].q + j;
        if (w->form == PACKED) groups = MAX(groups, w->groups);
        wide = MAX(wide, panel_floats(w));
    }
    wide = MAX(MAX(wide, panel_floats(m->head)), panel_floats(m->embed));
    s.alone = n == 1; s.Hp = ROUND(m->H, 16);
    float *room = aligned(4*n*(m->D + 2*q + 2*kv + 2*(int64_t)m->F));
    s.own = calloc(p->n, sizeof *s.own); s.scratch = calloc(p->n, sizeof *s.scratch); s.scores = calloc(p->n, sizeof *s.scores);
    int ok = room && s.own && s.scratch && s.scores;
    if (ok && n > 1) ok = new_acts(&s.shared, n, cols, groups, planes_of(m->mode, n));
    for (int i = 0; ok && i < p->n; i++)
        ok = (n > 1 || new_acts(&s.own[i], 1, cols, groups, planes_of(m->mode, 1))) && (s.scratch[i] = aligned(4*wide))
             && (s.scores[i] = aligned(4*(4*ROUND(last + 1, 32) + 8*s.Hp)));
    if (ok) {
        s.x = room; s.q = s.x + n*m->D; s.y = s.q + n*q; s.k = s.y + n*q; s.v = s.k + n*kv; s.g = s.v + n*kv; s.u = s.g + n*m->F;
        together(p, step_job, &s);
    }
    for (int i = 0; i < p->n; i++) {
        if (s.own) free_acts(&s.own[i]);
        if (s.scratch) free(s.scratch[i]);
        if (s.scores) free(s.scores[i]);
    }
    free_acts(&s.shared); free(s.own); free(s.scratch); free(s.scores); free(room);
    return ok ? 0 : -1;
}

// Put `n` tokens into the cache, the first at `start`; logits (outs, V) of the last `outs`. -1: no memory for it.
int nb_forward(pool *p, const model *m, const int64_t *tokens, int64_t n, int64_t start, int64_t outs, float *logits) {
    return forward((step){.p = p, .m = m, .tokens = tokens, .n = n, .start = start, .outs = outs, .logits = logits});
}

// A token for each of `n` texts, at its place in the cache of its own: `each` are models that differ in their caches alone; logits (n, V).
int nb_forward_each(pool *p, const model *const *each, const int64_t *tokens, const int64_t *starts, int64_t n, float *logits) {
    return forward((step){.p = p, .m = each[0], .tokens = tokens, .n = n, .outs = n, .logits = logits, .each = each, .starts = starts});
}
