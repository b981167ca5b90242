// What is written once and compiled for each instruction set: cpu.c includes this with NAME and one ISA_… defined.
// Floats are vectors of 16 in the compiler's own notation; integers in intrinsics, where the byte shuffle is.

typedef float NAME(v16) __attribute__((vector_size(64)));
typedef int32_t NAME(w16) __attribute__((vector_size(64)));
#define V NAME(v16)
#define WI NAME(w16)

INLINE void NAME(load)(V *v, const float *p) { memcpy(v, p, 64); }
INLINE float NAME(sum)(const V *v) {
    float a[16];
    memcpy(a, v, 64);
    for (int n = 8; n; n /= 2) for (int i = 0; i < n; i++) a[i] += a[i + n];
    return a[0];
}

// eˣ, to about 2 units in the last place; NaN stays NaN.
INLINE void NAME(exp)(V *out, V x) {
    WI low = x < -87.f, high = x > 88.f;
    x = (V)(((WI)x & ~low & ~high) | (low & (WI)((V){0} - 87.f)) | (high & (WI)((V){0} + 88.f)));
    WI inf = (x != x);
    V k = x*1.44269504f + 12582912.f;
    WI n = (WI)k - 0x4b400000;
    k = k - 12582912.f;
    V r = (x - k*0.693359375f) + k*2.12194440e-4f;
    V p = ((((r*1.9875691500e-4f + 1.3981999507e-3f)*r + 8.3334519073e-3f)*r + 4.1665795894e-2f)*r + 1.6666665459e-1f)*r + .5f;
    p = p*r*r + r + 1.f;
    p = p*(V)((n + 127) << 23);
    *out = (V)((inf & (WI)x) | (~inf & (WI)p));
}

static void NAME(norm)(const float *x, const float *w, float eps, int64_t n, float *y) {
    float s = 0;
    #pragma omp simd reduction(+:s)
    for (int64_t i = 0; i < n; i++) s += x[i]*x[i];
    s = 1/sqrtf(s/n + eps);
    for (int64_t i = 0; i < n; i++) y[i] = x[i]*s*w[i];
}

// silu(g)·u
static void NAME(gate)(const float *g, const float *u, int64_t n, float *y) {
    for (int64_t i = 0; i < n; i += 16) {
        float a[16] = {0}, b[16] = {0};
        int64_t m = MIN(16, n - i);
        V x, z, e;
        memcpy(a, g + i, 4*m); memcpy(b, u + i, 4*m);
        memcpy(&x, a, 64); memcpy(&z, b, 64);
        NAME(exp)(&e, -x);
        x = x/(e + 1.f)*z;
        memcpy(y + i, &x, 4*m);
    }
}

// ---- activations as integers -----------------------------------------------------------------------------------

// `n` floats as 8-bit numbers with one scale: planes of them, each of what the one before left. Not finite: scale NaN.
INLINE void NAME(round8)(const float *x, int n, int planes, int8_t **q, float *scale, int32_t *sum) {
    uint32_t top = 0;
    for (int i = 0; i < n; i++) { uint32_t b; memcpy(&b, x + i, 4); b &= 0x7fffffff; top = b > top ? b : top; }
    int bad = top >= 0x7f800000;
    float s = bad ? 0 : bits_float(top)/127, rest[SEG];
    if (s < 1e-30f) s = 0;
    memcpy(rest, x, 4*n);
    for (int p = 0; p < planes; p++, s /= 254) {
        float inv = s > 0 ? 1/s : 0;
        int32_t k[SEG], total = 0;
        if (bad || !(inv < 1e30f)) inv = 0;
        for (int i = 0; i < n; i++) k[i] = (int32_t)rintf((bad ? 0 : rest[i])*inv);
        for (int i = 0; i < n; i++) {
            k[i] = k[i] > 127 ? 127 : k[i] < -127 ? -127 : k[i];
            q[p][i] = (int8_t)k[i];
            total += k[i];
            rest[i] -= s*k[i];
        }
        scale[p] = bad ? NAN : s;
        sum[p] = total;
    }
}

static void NAME(prepare_segments)(acts *a, const matrix *m, int64_t t) {
    int64_t g = 0, P = a->planes;
    for (int64_t j = 0; j < m->blocks; j++) {
        int64_t width = MIN((int64_t)m->block_cols, m->cols - j*m->block_cols);
        for (int64_t c = 0; c < width; c += SEG, g++) {
            float x[SEG] = {0}, scale[2];
            int32_t sum[2];
            int8_t *q[2];
            int64_t at[2];
            memcpy(x, a->x + t*a->ld + j*m->block_cols + c, 4*MIN((int64_t)SEG, width - c));
            for (int p = 0; p < P; p++) { at[p] = acts_at(a, t*P + p, g); q[p] = a->q + at[p]*SEG; }
            NAME(round8)(x, SEG, (int)P, q, scale, sum);
            for (int p = 0; p < P; p++) { a->scale[at[p]] = scale[p]; a->sum[at[p]] = sum[p]; }
        }
    }
}

// A whole token in two planes with one scale, for rows of bytes, which have one scale as well.
static void NAME(prepare_row)(acts *a, int64_t t) {
    const float *x = a->x + t*a->ld;
    int8_t *q = a->r + 2*t*a->ld;
    float top = 0, *scale = a->rscale + 2*t;
    int32_t *sum = a->rsum + 2*t, bad = 0;
    for (int64_t i = 0; i < a->ld; i++) { float b = fabsf(x[i]); bad |= !(b <= 3e38f); top = b > top ? b : top; }
    scale[0] = bad ? NAN : top/127 < 1e-30f ? 0 : top/127; scale[1] = scale[0]/254;
    float inv = !bad && scale[0] > 0 ? 1/scale[0] : 0;
    sum[0] = sum[1] = 0;
    for (int64_t i = 0; i < a->ld; i++) {
        float u = bad ? 0 : x[i]*inv, f = rintf(u);
        int k = (int)f, k2 = (int)rintf((u - f)*254);
        k2 = k2 > 127 ? 127 : k2 < -127 ? -127 : k2;
        q[i] = (int8_t)k; q[a->ld + i] = (int8_t)k2;
        sum[0] += k; sum[1] += k2;
    }
}

static void NAME(prepare)(acts *a, const matrix *m, int64_t begin, int64_t end) {
    for (int64_t t = begin; a->planes && t < end; t++) {
        if (m->form == PACKED) NAME(prepare_segments)(a, m, t);
        else if (m->form >= I8) NAME(prepare_row)(a, t);
    }
}

// ---- the byte shuffle ------------------------------------------------------------------------------------------

#if ISA_AVX512
#define WIDE 64
typedef __m512i NAME(vi);
typedef __m512 NAME(vf);
#define VI NAME(vi)
#define VF NAME(vf)
#define LOAD(p) _mm512_loadu_si512((const void *)(p))
#define ALL(b) _mm512_set1_epi8(b)
#define RIGHT(x, n) _mm512_srli_epi32(x, n)
#define AND(x, y) _mm512_and_si512(x, y)
#define AND_OR(x, y, z) _mm512_ternarylogic_epi32(x, y, z, 0xea)
#define SHUFFLE(table, i) _mm512_shuffle_epi8(table, i)
#define LOOK_UP(table, i) _mm512_permutexvar_epi8(i, table)
#define TO_FLOAT(x) _mm512_cvtepi32_ps(x)
#define SET_F(x) _mm512_set1_ps(x)
#define MUL_F(a, b) _mm512_mul_ps(a, b)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define STORE_F(p, x) _mm512_storeu_ps(p, x)
// the instruction wants bytes without a sign on one side: entries are moved by 128, and what that adds is taken off
#define TABLE(x) _mm512_xor_si512(x, _mm512_set1_epi8((char)0x80))
#define BEGIN(C, sum) _mm512_set1_epi32(-(512/(C))*(sum))
#define DOT(acc, w, x) _mm512_dpbusd_epi32(acc, w, x)
INLINE VI NAME(repeat)(const void *p, int C) {
    if (C == 4) { int32_t x; memcpy(&x, p, 4); return _mm512_set1_epi32(x); }
    if (C == 8) { int64_t x; memcpy(&x, p, 8); return _mm512_set1_epi64(x); }
    return _mm512_broadcast_i32x4(_mm_loadu_si128(p));
}
INLINE VF NAME(scales)(const uint16_t *p, int half, int C) {
    __m256i h = C == 4 ? _mm256_loadu_si256((const void *)p) : C == 8 ? _mm256_castsi128_si256(_mm_loadu_si128((const void *)p))
                : _mm256_castsi128_si256(_mm_loadl_epi64((const void *)p));
    VF f = half ? _mm512_cvtph_ps(h) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
    if (C == 4) return f;
    return C == 8 ? _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), f)
                  : _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3), f);
}
#elif ISA_AVX2
#define WIDE 32
typedef __m256i NAME(vi);
typedef __m256 NAME(vf);
#define VI NAME(vi)
#define VF NAME(vf)
#define LOAD(p) _mm256_loadu_si256((const void *)(p))
#define ALL(b) _mm256_set1_epi8(b)
#define RIGHT(x, n) _mm256_srli_epi32(x, n)
#define AND(x, y) _mm256_and_si256(x, y)
#define AND_OR(x, y, z) _mm256_or_si256(_mm256_and_si256(x, y), z)
#define SHUFFLE(table, i) _mm256_shuffle_epi8(table, i)
#define LOOK_UP SHUFFLE
#define TO_FLOAT(x) _mm256_cvtepi32_ps(x)
#define SET_F(x) _mm256_set1_ps(x)
#define MUL_F(a, b) _mm256_mul_ps(a, b)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define STORE_F(p, x) _mm256_storeu_ps(p, x)
#define TABLE(x) (x)
#define BEGIN(C, sum) _mm256_setzero_si256()
// |w| · (x with w's sign): 128·127·2 still fits 16 bits
#define DOT(acc, w, x) _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)), _mm256_set1_epi16(1)))
INLINE VI NAME(repeat)(const void *p, int C) {
    if (C == 4) { int32_t x; memcpy(&x, p, 4); return _mm256_set1_epi32(x); }
    if (C == 8) { int64_t x; memcpy(&x, p, 8); return _mm256_set1_epi64x(x); }
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(p));
}
INLINE VF NAME(scales)(const uint16_t *p, int half, int C) {
    __m128i h;
    if (C == 4) h = _mm_loadu_si128((const void *)p);
    else if (C == 8) h = _mm_loadl_epi64((const void *)p);
    else { int32_t x; memcpy(&x, p, 4); h = _mm_cvtsi32_si128(x); }
    VF f = half ? _mm256_cvtph_ps(h) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
    if (C == 4) return f;
    return C == 8 ? _mm256_permutevar8x32_ps(f, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3))
                  : _mm256_permutevar8x32_ps(f, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
}
#elif ISA_NEON
#define WIDE 16
#define VI uint8x16_t
#define VF float32x4_t
#define LOAD(p) vld1q_u8((const uint8_t *)(p))
#define ALL(b) vdupq_n_u8((uint8_t)(b))
#define RIGHT(x, n) vreinterpretq_u8_u32(vshrq_n_u32(vreinterpretq_u32_u8(x), n))
#define AND(x, y) vandq_u8(x, y)
#define AND_OR(x, y, z) vorrq_u8(vandq_u8(x, y), z)
#define SHUFFLE(table, i) vqtbl1q_u8(table, i)
#define LOOK_UP SHUFFLE
#define TO_FLOAT(x) vcvtq_f32_s32(vreinterpretq_s32_u8(x))
#define SET_F(x) vdupq_n_f32(x)
#define MUL_F(a, b) vmulq_f32(a, b)
#define FMA(a, b, c) vfmaq_f32(c, a, b)
#define STORE_F(p, x) vst1q_f32(p, x)
#define TABLE(x) (x)
#define BEGIN(C, sum) vdupq_n_u8(0)
#define DOT(acc, w, x) vreinterpretq_u8_s32(vdotq_s32(vreinterpretq_s32_u8(acc), vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(x)))
INLINE VI NAME(repeat)(const void *p, int C) {
    uint8_t b[16];
    for (int i = 0; i < 16; i += C) memcpy(b + i, p, C);
    return vld1q_u8(b);
}
INLINE VF NAME(scales)(const uint16_t *p, int half, int C) {
    float f[4];
    for (int i = 0; i < 4; i++) { uint16_t h = p[C == 4 ? i : C == 8 ? i/2 : 0]; f[i] = half ? half_float(h) : bf16_float(h); }
    return vld1q_f32(f);
}
#endif

#if ISA_SCALAR
static void NAME(tile)(const matrix *m, int64_t tile, const acts *a, int64_t t, int64_t count, float *y, int64_t ldy) {
    int bits = m->bits, C = columns_of(bits), R = rows_of(bits), K = 1 << bits, per = 8/bits + (bits == 3);
    int64_t rows = MIN((int64_t)R, m->rows - tile*R), g = 0;
    const uint8_t *w = m->words + tile*m->groups*group_bytes(bits);
    float total[16][16] = {{0}};
    for (int64_t j = 0; j < m->blocks; j++) {
        int64_t at = tile*m->blocks + j;
        for (int64_t end = g + block_groups(m, j); g < end; g++, w += group_bytes(bits)) for (int r = 0; r < rows; r++) {
            const int8_t *table = m->tables + (m->shared ? at*K : at*SEG + r*K);
            float scale = scale_float(m, m->scales[m->shared ? at : at*R + r]);
            int8_t e[SEG];
            for (int c = 0; c < SEG; c++) {
                int k = c/C, i = r*C + c % C, idx;
                if (bits != 3) idx = w[k/per*SEG + i] >> bits*(k % per) & (K - 1);
                else if (k < 6) idx = w[k/2*SEG + i] >> 4*(k % 2) & 7;
                else {
                    int s = (w[i] >> 3 & 0x11) | (w[SEG + i] >> 2 & 0x22) | (w[2*SEG + i] >> 1 & 0x44);
                    idx = s >> 4*(k - 6) & 7;
                }
                e[c] = table[idx];
            }
            for (int64_t n = 0; n < count; n++) {
                const int64_t own = t*a->groups + g*count + n;
                const int8_t *q = a->q + own*SEG;
                int32_t s = 0;
                for (int c = 0; c < SEG; c++) s += e[c]*q[c];
                total[n][r] += s*(scale*a->scale[own]);
            }
        }
    }
    for (int64_t n = 0; n < count; n++) for (int r = 0; r < rows; r++) y[(t + n)/a->planes*ldy + tile*R + r] += total[n][r]*factor_of(m);
}
#else
// 64 columns' indices, each with the place of its row's table in the 16 bytes that the shuffle knows.
INLINE void NAME(unfold)(const uint8_t *w, int bits, VI row, VI *i, int shared) {
#if ISA_AVX512
    // one table for all: it is repeated through the 64 bytes that `vpermb` knows, and higher bits of a place do not matter
    if (shared) {
        VI a = LOAD(w), b = LOAD(w + SEG);
        if (bits == 3) {
            VI c = LOAD(w + 2*SEG);
            VI s = AND_OR(RIGHT(c, 1), ALL(0x44), AND_OR(RIGHT(b, 2), ALL(0x22), AND(RIGHT(a, 3), ALL(0x11))));
            i[0] = a; i[1] = RIGHT(a, 4); i[2] = b; i[3] = RIGHT(b, 4); i[4] = c; i[5] = RIGHT(c, 4); i[6] = s; i[7] = RIGHT(s, 4);
        } else if (bits == 4) { i[0] = a; i[1] = RIGHT(a, 4); i[2] = b; i[3] = RIGHT(b, 4); }
        else for (int k = 0; k < 4; k++) { a = LOAD(w + k*SEG); i[4*k] = a; i[4*k + 1] = RIGHT(a, 2); i[4*k + 2] = RIGHT(a, 4); i[4*k + 3] = RIGHT(a, 6); }
        return;
    }
#endif
    if (bits == 3) {
        VI a = LOAD(w), b = LOAD(w + SEG), c = LOAD(w + 2*SEG), seven = ALL(7);
        VI s = AND_OR(RIGHT(c, 1), ALL(0x44), AND_OR(RIGHT(b, 2), ALL(0x22), AND(RIGHT(a, 3), ALL(0x11))));
        i[0] = AND_OR(a, seven, row); i[1] = AND_OR(RIGHT(a, 4), seven, row);
        i[2] = AND_OR(b, seven, row); i[3] = AND_OR(RIGHT(b, 4), seven, row);
        i[4] = AND_OR(c, seven, row); i[5] = AND_OR(RIGHT(c, 4), seven, row);
        i[6] = AND_OR(s, seven, row); i[7] = AND_OR(RIGHT(s, 4), seven, row);
    } else if (bits == 4) for (int k = 0; k < 2; k++) {
        VI a = LOAD(w + k*SEG);
        i[2*k] = AND(a, ALL(15)); i[2*k + 1] = AND(RIGHT(a, 4), ALL(15));
    } else for (int k = 0; k < 4; k++) {
        VI a = LOAD(w + k*SEG), three = ALL(3);
        i[4*k] = AND_OR(a, three, row); i[4*k + 1] = AND_OR(RIGHT(a, 2), three, row);
        i[4*k + 2] = AND_OR(RIGHT(a, 4), three, row); i[4*k + 3] = AND_OR(RIGHT(a, 6), three, row);
    }
}

// One tile's rows, `M` planes of tokens from `t` on: y += x Wᵀ.
INLINE void NAME(tile)(const matrix *m, int64_t tile, const acts *a, int64_t t, const int M, float *y, int64_t ldy, const int bits, const int shared) {
    const int C = bits == 2 ? 4 : bits == 3 ? 8 : 16, R = SEG/C, K = 1 << bits, n = SEG/C, parts = SEG/WIDE;
    const int64_t G = a->groups;
    uint8_t places[WIDE];
    for (int i = 0; i < WIDE; i++) places[i] = i % 16/C*K;
    const VI row = LOAD(places);
    for (int part = 0; part < parts; part++) {
        const uint8_t *w = m->words + tile*m->groups*group_bytes(bits) + part*WIDE;
        VF total[16];
        int64_t g = 0;
        UNROLL
        for (int i = 0; i < M; i++) total[i] = SET_F(0);
        for (int64_t j = 0; j < m->blocks; j++) {
            const int64_t at = tile*m->blocks + j;
            const VI table = TABLE(shared ? NAME(repeat)(m->tables + at*K, K) : LOAD(m->tables + at*SEG + part*WIDE));
            const VF scale = shared ? SET_F(scale_float(m, m->scales[at])) : NAME(scales)(m->scales + at*R + part*(R/parts), m->half, C);
            for (int64_t end = g + block_groups(m, j); g < end; g++, w += group_bytes(bits)) {
                const int64_t own = t*G + g*M;
                const int8_t *q = a->q + own*SEG;
                VI i[16], acc[16];
#if defined(__x86_64__)
                for (int b = 0; b < vectors_of(bits) && part == 0 && M <= 4; b++) _mm_prefetch((const char *)w + 3072 + b*64, _MM_HINT_T0);
#endif
                NAME(unfold)(w, bits, row, i, shared);
                UNROLL
                for (int k = 0; k < M; k++) acc[k] = BEGIN(C, a->sum[own + k]);
                UNROLL
                for (int v = 0; v < n; v++) {
                    VI e = shared ? LOOK_UP(table, i[v]) : SHUFFLE(table, i[v]);
                    UNROLL
                    for (int k = 0; k < M; k++) acc[k] = DOT(acc[k], e, NAME(repeat)(q + k*SEG + v*C, C));
                }
                UNROLL
                for (int k = 0; k < M; k++)
                    total[k] = FMA(TO_FLOAT(acc[k]), MUL_F(scale, SET_F(a->scale[own + k])), total[k]);
            }
        }
        const int64_t first = tile*R + part*(R/parts), rows = MIN((int64_t)(R/parts), m->rows - first);
        UNROLL
        for (int k = 0; k < M; k++) {
            float f[WIDE/4], *out = y + ((t + k) >> (a->planes - 1))*ldy + first;
            STORE_F(f, MUL_F(total[k], SET_F(factor_of(m))));
            for (int r = 0; r < rows; r++) for (int l = 0; l < C/4; l++) out[r] += f[r*(C/4) + l];
        }
    }
}

#define TILES_OF(bits, shared) \
    if (M == 16) NAME(tile)(m, tile, a, t, 16, y, ldy, bits, shared); else if (M == 4) NAME(tile)(m, tile, a, t, 4, y, ldy, bits, shared); \
    else if (M == 2) NAME(tile)(m, tile, a, t, 2, y, ldy, bits, shared); else NAME(tile)(m, tile, a, t, 1, y, ldy, bits, shared)
#define TILES(bits) if (m->shared) { TILES_OF(bits, 1); } else { TILES_OF(bits, 0); }
static void NAME(tile2)(const matrix *m, int64_t tile, const acts *a, int64_t t, int M, float *y, int64_t ldy) { TILES(2); }
static void NAME(tile3)(const matrix *m, int64_t tile, const acts *a, int64_t t, int M, float *y, int64_t ldy) { TILES(3); }
static void NAME(tile4)(const matrix *m, int64_t tile, const acts *a, int64_t t, int M, float *y, int64_t ldy) { TILES(4); }
#undef TILES
#undef TILES_OF
#endif

static void NAME(packed)(const matrix *m, const acts *a, int64_t begin, int64_t end, float *y, int64_t ldy) {
    int R = rows_of(m->bits);
    int64_t count = a->n*a->planes;
    for (int64_t tile = begin/R; tile*R < end; tile++) for (int64_t t = 0; t < count;) {
        int M = chunk_of(count - t);
#if ISA_SCALAR
        NAME(tile)(m, tile, a, t, M, y, ldy);
#else
        (m->bits == 2 ? NAME(tile2) : m->bits == 3 ? NAME(tile3) : NAME(tile4))(m, tile, a, t, M, y, ldy);
#endif
        t += M;
    }
}

// ---- rows of bytes ---------------------------------------------------------------------------------------------

// Row `r` of an embedding as int8, of 6 or 4 bits unpacked into `room`.
INLINE const int8_t *NAME(bytes)(const matrix *m, int64_t r, int8_t *room) {
    const uint8_t *p = (const uint8_t *)m->data;
    if (m->form == I8) return (const int8_t *)p + r*m->cols;
    int bits = m->form == I6 ? 6 : 4;
    int64_t i = 0;
    p += r*m->cols*bits/8;
    for (; i + 8 <= m->cols; i += 8, p += bits) {
        uint64_t x = 0;
        memcpy(&x, p, bits);
        if (bits == 6) {
            x = (x & 0xffffff) | (x & 0xffffff000000ull) << 8;
            x = (x & 0x00000fff00000fffull) | (x & 0x00fff00000fff000ull) << 4;
            x = (x & 0x003f003f003f003full) | (x & 0x0fc00fc00fc00fc0ull) << 2;
        } else { uint64_t b; spread((uint32_t)x, &b); x = b; }
        memcpy(room + i, &x, 8);
    }
    for (int64_t at = 0; i < m->cols; i++, at += bits) {
        int x = p[at/8] >> at % 8;
        if (at % 8 + bits > 8) x |= p[at/8 + 1] << (8 - at % 8);
        room[i] = (int8_t)(x & ((1 << bits) - 1));
    }
    for (i = 0; i < m->cols; i++) room[i] -= (1 << (bits - 1)) - 1;
    return room;
}

// w · both planes of a token, each a sum of 32 bits.
INLINE void NAME(dot_bytes)(const int8_t *w, const int8_t *q, int64_t ld, int64_t cols, int32_t *out) {
    int64_t whole = cols/SEG*SEG;
    int8_t tail[SEG] = {0};
    memcpy(tail, w + whole, cols - whole);
#if ISA_SCALAR
    for (int p = 0; p < 2; p++) {
        int32_t s = 0;
        for (int64_t i = 0; i < whole; i++) s += w[i]*q[p*ld + i];
        for (int64_t i = whole; i < cols; i++) s += tail[i - whole]*q[p*ld + i];
        out[p] = s;
    }
#elif ISA_AVX512
    __m512i a = _mm512_setzero_si512(), b = a, flip = _mm512_set1_epi8((char)0x80);
    for (int64_t i = 0; i < whole; i += SEG) {
        __m512i x = _mm512_xor_si512(LOAD(w + i), flip);
        a = _mm512_dpbusd_epi32(a, x, LOAD(q + i)); b = _mm512_dpbusd_epi32(b, x, LOAD(q + ld + i));
    }
    if (whole < cols) {
        __m512i x = _mm512_xor_si512(LOAD(tail), flip);
        a = _mm512_dpbusd_epi32(a, x, LOAD(q + whole)); b = _mm512_dpbusd_epi32(b, x, LOAD(q + ld + whole));
    }
    out[0] = _mm512_reduce_add_epi32(a); out[1] = _mm512_reduce_add_epi32(b);
#else
    for (int p = 0; p < 2; p++) {
        VI acc = BEGIN(4, 0);
        int32_t s[WIDE/4], total = 0;
        for (int64_t i = 0; i < whole; i += WIDE) acc = DOT(acc, LOAD(w + i), LOAD(q + p*ld + i));
        for (int64_t i = whole; i < cols; i += WIDE) acc = DOT(acc, LOAD(tail + i - whole), LOAD(q + p*ld + i));
        memcpy(s, &acc, WIDE);
        for (int k = 0; k < WIDE/4; k++) total += s[k];
        out[p] = total;
    }
#endif
}

static void NAME(byte_rows)(const matrix *m, const acts *a, int64_t begin, int64_t end, float *y, int64_t ldy, float *scratch) {
    for (int64_t r = begin; r < end; r++) {
        const int8_t *w = NAME(bytes)(m, r, (int8_t *)scratch);
        for (int64_t t = 0; t < a->n; t++) {
            int32_t s[2];
            NAME(dot_bytes)(w, a->r + 2*t*a->ld, a->ld, m->cols, s);
#if ISA_AVX512
            for (int p = 0; p < 2; p++) s[p] -= 128*a->rsum[2*t + p];
#endif
            y[t*ldy + r] += m->row_scales[r]*(s[0]*a->rscale[2*t] + s[1]*a->rscale[2*t + 1]);
        }
    }
}

// ---- floats ----------------------------------------------------------------------------------------------------

// The indices of 64 columns of row r of a tile, a byte each: the row's C bytes of every vector, at once.
INLINE void NAME(row_indices)(const uint8_t *w, int bits, int r, uint8_t *idx) {
    const uint64_t one = 0x0101010101010101ull;
    uint64_t v[4], s[8];
    int C = columns_of(bits), n = vectors_of(bits);
    for (int h = 0; h < C; h += 8) {   // 8 bytes at a time, of which 2 bits need 4
        UNROLL for (int k = 0; k < n; k++) { v[k] = 0; memcpy(&v[k], w + k*SEG + r*C + h, MIN(C, 8)); }
        if (bits == 3) {
            UNROLL for (int k = 0; k < 6; k++) s[k] = v[k/2] >> 4*(k % 2) & 7*one;
            uint64_t t = (v[0] >> 3 & 0x11*one) | (v[1] >> 2 & 0x22*one) | (v[2] >> 1 & 0x44*one);
            s[6] = t & 7*one; s[7] = t >> 4 & 7*one;
        } else if (bits == 4) for (int k = 0; k < 4; k++) s[k] = v[k/2] >> 4*(k % 2) & 15*one;
        for (int k = 0; k < SEG/C; k++) {
            uint64_t x = bits == 2 ? v[k/4] >> 2*(k % 4) & 3*one : s[k % 8];
            memcpy(idx + k*C + h, &x, MIN(C, 8));
        }
    }
}

// 64 columns of one row of a tile, as the floats of the file's codebook.
INLINE void NAME(entries)(const uint8_t *w, int bits, int r, const float *e, float *out) {
    uint8_t idx[SEG];
    NAME(row_indices)(w, bits, r, idx);
#if ISA_AVX512
    __m512 table = _mm512_loadu_ps(e);
    for (int c = 0; c < SEG; c += 16)
        _mm512_storeu_ps(out + c, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(idx + c))), table));
#elif ISA_AVX2
    __m256 low = _mm256_loadu_ps(e), high = _mm256_loadu_ps(e + 8);
    for (int c = 0; c < SEG; c += 8) {
        __m256i i = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(idx + c)));
        __m256 x = _mm256_permutevar8x32_ps(low, i);
        if (bits == 4) x = _mm256_blendv_ps(x, _mm256_permutevar8x32_ps(high, i), _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
        _mm256_storeu_ps(out + c, x);
    }
#else
    for (int c = 0; c < SEG; c++) out[c] = e[idx[c]];
#endif
}

static void NAME(packed_panel)(const matrix *m, int64_t row, int64_t n, float *out, int64_t ld) {
    int R = rows_of(m->bits);
    for (int64_t i = 0; i < n; i++) {
        int64_t r = row + i, tile = r/R, last = m->cols;
        const uint8_t *w = m->words + tile*m->groups*group_bytes(m->bits);
        for (int64_t j = 0; j < m->blocks; j++) {
            int64_t width = MIN((int64_t)m->block_cols, m->cols - j*m->block_cols);
            float e[16] = {0};
            file_table(m, r/m->block_rows*m->blocks + j, e);
            for (int64_t c = 0; c < width; c += SEG, w += group_bytes(m->bits)) {
                float x[SEG];
                if (m->bits == 3) NAME(entries)(w, 3, (int)(r % R), e, x);
                else if (m->bits == 4) NAME(entries)(w, 4, (int)(r % R), e, x);
                else NAME(entries)(w, 2, (int)(r % R), e, x);
                memcpy(out + i*ld + j*m->block_cols + c, x, 4*MIN((int64_t)SEG, width - c));
            }
        }
        memset(out + i*ld + last, 0, 4*(ld - last));
    }
}

// Rows of any matrix, exactly, zeros from `cols` to `ld`.
static void NAME(panel)(const matrix *m, int64_t row, int64_t n, float *out, int64_t ld) {
    if (m->form == PACKED) { NAME(packed_panel)(m, row, n, out, ld); return; }
    for (int64_t i = 0; i < n; i++) {
        float *y = out + i*ld;
        int64_t at = (row + i)*m->cols;
        if (m->form == F32) memcpy(y, (const float *)m->data + at, 4*m->cols);
        else if (m->form == BF16) {
            const uint16_t *h = (const uint16_t *)m->data + at;
            for (int64_t c = 0; c < m->cols; c++) { uint32_t b = (uint32_t)h[c] << 16; memcpy(y + c, &b, 4); }
        } else {
            int8_t *room = (int8_t *)(y + m->cols) - m->cols;   // the row's last quarter: each byte is read before its place is written
            const int8_t *w = NAME(bytes)(m, row + i, room);
            float s = m->row_scales[row + i];
            for (int64_t c = 0; c < m->cols; c++) { int8_t b = w[c]; y[c] = b*s; }
        }
        memset(y + m->cols, 0, 4*(ld - m->cols));
    }
}

// y += x Wᵀ with rows in `panel`: 4 tokens × 4 rows at a time.
static void NAME(float_product)(const acts *a, const float *panel, int64_t n, float *y, int64_t ldy) {
    for (int64_t t = 0; t < a->n; t += 4) for (int64_t r = 0; r < n; r += 4) {
        V acc[4][4];
        const float *x[4], *w[4];
        for (int i = 0; i < 4; i++) {
            x[i] = a->x + MIN(t + i, a->n - 1)*a->ld; w[i] = panel + MIN(r + i, n - 1)*a->ld;
            for (int j = 0; j < 4; j++) acc[i][j] = (V){0};
        }
        if (a->n - t == 1) for (int64_t c = 0; c < a->ld; c += 16) {
            V p, q;
            NAME(load)(&p, x[0] + c);
            for (int j = 0; j < 4; j++) { NAME(load)(&q, w[j] + c); acc[0][j] += p*q; }
        } else for (int64_t c = 0; c < a->ld; c += 16) {
            V p[4], q;
            for (int i = 0; i < 4; i++) NAME(load)(&p[i], x[i] + c);
            for (int j = 0; j < 4; j++) { NAME(load)(&q, w[j] + c); for (int i = 0; i < 4; i++) acc[i][j] += p[i]*q; }
        }
        for (int i = 0; i < 4 && t + i < a->n; i++) for (int j = 0; j < 4 && r + j < n; j++) y[(t + i)*ldy + r + j] += NAME(sum)(&acc[i][j]);
    }
}

static void NAME(multiply)(const matrix *m, const acts *a, int64_t begin, int64_t end, float *y, int64_t ldy, float *scratch) {
    if (a->planes && m->form == PACKED) { NAME(packed)(m, a, begin, end, y, ldy); return; }
    if (a->planes && m->form >= I8) { NAME(byte_rows)(m, a, begin, end, y, ldy, scratch); return; }
    for (int64_t r = begin; r < end; r += 16) {
        int64_t n = MIN(16, end - r);
        NAME(panel)(m, r, n, scratch, a->ld);
        NAME(float_product)(a, scratch, n, y + r, ldy);
    }
}

// ---- attention -------------------------------------------------------------------------------------------------

// Up to 4 queries (q, y: ld apart), the first at position `at`, each `next` later: softmax(q Kᵀ/√H) V over all before.
// With `Q` a constant the sums stay in registers.
INLINE void NAME(attend_some)(const model *m, int64_t kv, const float *q, int64_t ld, int64_t at, int next, int n, int Hp, float *room, float *y, const int Q) {
    const float *K = m->keys + kv*m->capacity*m->H, *Vs = m->values + kv*m->capacity*Hp;
    const float factor = 1/sqrtf(m->H);
    const int64_t last = at + (n - 1)*next, S = ROUND(last + 1, 32);
    float *score[4], top[4];
    const float *query[4];
    for (int i = 0; i < Q; i++) { score[i] = room + i*S; top[i] = -INFINITY; query[i] = q + MIN(i, n - 1)*ld; }
    for (int64_t s = 0; s <= last; s += 32) {
        V a[4][2], k[2];
        UNROLL
        for (int i = 0; i < Q; i++) a[i][0] = a[i][1] = (V){0};
        for (int h = 0; h < m->H; h++) {
            NAME(load)(&k[0], K + s*m->H + 32*h); NAME(load)(&k[1], K + s*m->H + 32*h + 16);
            UNROLL
            for (int i = 0; i < Q; i++) { a[i][0] += k[0]*query[i][h]; a[i][1] += k[1]*query[i][h]; }
        }
        for (int i = 0; i < Q; i++) for (int j = 0; j < 2; j++) { a[i][j] *= factor; memcpy(score[i] + s + 16*j, &a[i][j], 64); }
    }
    for (int i = 0; i < Q; i++) {
        int64_t own = MIN(at + i*next, last);   // the last position that it sees
        float total = 0, *p = score[i];
        for (int64_t s = own + 1; s < S; s++) p[s] = -INFINITY;
        V most;
        NAME(load)(&most, p);
        for (int64_t s = 16; s < S; s += 16) {
            V x;
            NAME(load)(&x, p + s);
            WI more = ~(x <= most);   // NaN, too
            most = (V)((more & (WI)x) | (~more & (WI)most));
        }
        for (int k = 0; k < 16; k++) if (!(most[k] <= top[i])) top[i] = most[k];
        for (int64_t s = 0; s < S; s += 16) {
            V x;
            NAME(load)(&x, p + s);
            NAME(exp)(&x, x - top[i]);
            memcpy(p + s, &x, 64);
        }
        for (int64_t s = own + 1; s < S; s++) p[s] = 0;
        #pragma omp simd reduction(+:total)
        for (int64_t s = 0; s < S; s++) total += p[s];
        top[i] = 1/total;
    }
    for (int h = 0; h < Hp; h += 32) {
        const int two = Hp - h > 16;
        V a[4][2], v[2];
        UNROLL
        for (int i = 0; i < Q; i++) a[i][0] = a[i][1] = (V){0};
        if (two) for (int64_t s = 0; s <= last; s++) {
            NAME(load)(&v[0], Vs + s*Hp + h); NAME(load)(&v[1], Vs + s*Hp + h + 16);
            UNROLL
            for (int i = 0; i < Q; i++) { a[i][0] += v[0]*score[i][s]; a[i][1] += v[1]*score[i][s]; }
        } else for (int64_t s = 0; s <= last; s++) {
            NAME(load)(&v[0], Vs + s*Hp + h);
            UNROLL
            for (int i = 0; i < Q; i++) a[i][0] += v[0]*score[i][s];
        }
        for (int i = 0; i < Q && i < n; i++) {
            float out[32];
            for (int j = 0; j < 2; j++) { a[i][j] *= top[i]; memcpy(out + 16*j, &a[i][j], 64); }
            memcpy(y + i*ld + h, out, 4*MIN(32, m->H - h));
        }
    }
}

static void NAME(attend)(const model *m, int64_t kv, const float *q, int64_t ld, int64_t at, int next, int n, int Hp, float *room, float *y) {
    if (n == 1) NAME(attend_some)(m, kv, q, ld, at, next, 1, Hp, room, y, 1);
    else if (n == 2) NAME(attend_some)(m, kv, q, ld, at, next, 2, Hp, room, y, 2);
    else if (n == 3) NAME(attend_some)(m, kv, q, ld, at, next, 3, Hp, room, y, 3);
    else NAME(attend_some)(m, kv, q, ld, at, next, 4, Hp, room, y, 4);
}

#if ISA_AVX512
#define ISA_NAME "avx512"
#elif ISA_AVX2
#define ISA_NAME "avx2"
#elif ISA_NEON
#define ISA_NAME "neon"
#else
#define ISA_NAME "scalar"
#endif
static const isa NAME(isa) = {ISA_NAME, NAME(prepare), NAME(multiply), NAME(panel), NAME(norm), NAME(gate), NAME(attend)};

#undef ISA_NAME
#undef V
#undef WI
#undef VI
#undef VF
#undef WIDE
#undef LOAD
#undef ALL
#undef RIGHT
#undef AND
#undef AND_OR
#undef SHUFFLE
#undef LOOK_UP
#undef TO_FLOAT
#undef SET_F
#undef MUL_F
#undef FMA
#undef STORE_F
#undef TABLE
#undef BEGIN
#undef DOT
