// Attention of one new token over a cache. A cluster is a head, its blocks share the positions; a row of H numbers is read by H/8 lanes, 16 bytes each, of a group
// of 8, 16 or 32. Lanes of the group beyond the row (where H is 96) hold zeros.
template<int H> constexpr int LANES = H <= 64 ? 8 : H <= 128 ? 16 : 32;
#define EACH_H(F) F(64) F(96) F(128) F(256)   // sizes of a head
constexpr int ATTEND_THREADS = 128, AHEAD = 4;   // AHEAD: rows a lane of `attend` has on their way
struct HeadNorms { const void *q, *k; float eps; };   // weights of H numbers each that queries and keys are normed with; null: they are not
struct AttendArgs { const void *qkv, *cos, *sin; void *keys, *values; const long long* at; void* y; int heads, kv_heads; float scale; int bf16; HeadNorms norms; };
// a softmax in memory: sum of values, largest score, sum of exponentials, up to 16 bytes
template<int H> constexpr int WIDTH = H + 4;
static int attend_bytes(int H, int ranks) { return 4*(H + 4)*(ATTEND_THREADS/32 + ranks); }

// eight neighbouring numbers of a row
struct Eight {
    float v[8];
    DEV void load(const void* row, int d, int bf16) { unpack(load_x((const uint16_t*)row + d), bf16); }
    DEV void unpack(uint4 r, int bf16) {
        const uint32_t w[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            v[2*i] = bf16 ? __uint_as_float(w[i] << 16) : lo_half(w[i]);
            v[2*i + 1] = bf16 ? __uint_as_float(w[i] & 0xffff0000u) : hi_half(w[i]);
        }
    }
    DEV uint4 packed(int bf16) const {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] = bf16 ? floats_to_bf16(v[2*i], v[2*i + 1]) : floats_to_half2(v[2*i], v[2*i + 1]);
        return make_uint4(w[0], w[1], w[2], w[3]);
    }
    DEV void round(int bf16) { unpack(packed(bf16), bf16); }
    DEV void set(float4 a, float4 b) { v[0] = a.x; v[1] = a.y; v[2] = a.z; v[3] = a.w; v[4] = b.x; v[5] = b.y; v[6] = b.z; v[7] = b.w; }
    DEV void plus(const Eight& o) {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] += o.v[i];
    }
    DEV float dot(const Eight& o) const {
        float s = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) s = fmaf(v[i], o.v[i], s);
        return s;
    }
};
// a softmax under way: the largest score, the sum of exponentials, their sum of values
struct Running {
    float top, total; Eight sum;
    DEV static float weight(float top, float of) { return top == -INFINITY ? 0.f : fast_exp(top - of); }
    template<int N> DEV void add(const float (&score)[N], const uint4 (&values)[N], int bf16) {
        float high = top;
#pragma unroll
        for (int n = 0; n < N; n++) high = fmaxf(high, score[n]);
        const float old = weight(top, high);
        total *= old; top = high;
#pragma unroll
        for (int i = 0; i < 8; i++) sum.v[i] *= old;
#pragma unroll
        for (int n = 0; n < N; n++) {
            const float now = weight(score[n], high);
            Eight v; v.unpack(values[n], bf16);
            total += now;
#pragma unroll
            for (int i = 0; i < 8; i++) sum.v[i] = fmaf(now, v.v[i], sum.v[i]);
        }
    }
    DEV void join(int mask) {   // with the lane that lies `mask` away
        const float there = shfl_xor(top, mask), high = fmaxf(top, there), a = weight(top, high), b = weight(there, high);
        total = total*a + shfl_xor(total, mask)*b; top = high;
#pragma unroll
        for (int i = 0; i < 8; i++) sum.v[i] = sum.v[i]*a + shfl_xor(sum.v[i], mask)*b;
    }
};
// n softmaxes as one
template<int H, class F> DEV float joined(F from, int n, int d, float& top, float& total) {
    float v = 0; top = -INFINITY; total = 0;
#pragma unroll 8
    for (int i = 0; i < n; i++) top = fmaxf(top, from(i*WIDTH<H> + H));
#pragma unroll 8
    for (int i = 0; i < n; i++) { const float w = Running::weight(from(i*WIDTH<H> + H), top); v += w*from(i*WIDTH<H> + d); total += w*from(i*WIDTH<H> + H + 1); }
    return v;
}
template<int H, int N> DEV void add_up(float (&s)[N]) {   // over the lanes of a row
#pragma unroll
    for (int m = LANES<H>/2; m; m /= 2)
#pragma unroll
        for (int n = 0; n < N; n++) s[n] += shfl_xor(s[n], m);
}
// numbers d…d+7 of a head: normed where there are weights `w`, rounded, its pairs (i, i + H/2) turned, rounded as the cache rounds them
template<int H> DEV Eight turned(uint4 own_, bool normed, uint4 w_, float eps, int d, const float* cos, const float* sin, int bf16) {
    Eight own, other;
    own.unpack(own_, bf16);
    if (normed) {
        Eight w; w.unpack(w_, bf16);
        float sum[1] = {own.dot(own)}; add_up<H>(sum);
        const float f = inverse_sqrt(sum[0]/H + eps);
#pragma unroll
        for (int i = 0; i < 8; i++) own.v[i] = own.v[i]*f*w.v[i];
        own_ = own.packed(bf16); own.unpack(own_, bf16);
    }
    const int lane = threadIdx.x%32, there = d < H/2 ? lane + H/16 : d < H ? lane - H/16 : lane;   // that has the other half
    other.unpack(make_uint4(shfl(own_.x, there), shfl(own_.y, there), shfl(own_.z, there), shfl(own_.w, there)), bf16);
#pragma unroll
    for (int i = 0; i < 8; i++) own.v[i] = own.v[i]*cos[d%(H/2) + i] + (d < H/2 ? -1.f : 1.f)*other.v[i]*sin[d%(H/2) + i];
    own.round(bf16);
    return own;
}
// what a warp knows of one head: its query times the scale and, if it is the one that has the newest token, key and value of that one, all turned
template<int H> struct Head {
    Eight q, k, v; bool newest;
    // take(numbers, n, at): n times 16 bytes, where at(i) says
    template<class F> DEV void load(F take, const uint16_t* x, int heads, int kv_heads, int head, int kv, int d, const float* cos, const float* sin, const HeadNorms& norms, float scale, int bf16, bool newest_) {
        const int at = min(d, H - 8), from[3] = {head*H + at, (heads + kv)*H + at, (heads + kv_heads + kv)*H + at};
        uint4 r[3], w[2] = {};
        newest = newest_;
        if (norms.q) { w[0] = load_x((const uint16_t*)norms.q + at); if (newest) w[1] = load_x((const uint16_t*)norms.k + at); }
        take(r, newest ? 3 : 1, [&](int i) { return x + from[i]; });
        if (d >= H) r[0] = r[1] = r[2] = make_uint4(0, 0, 0, 0);
        q = turned<H>(r[0], norms.q, w[0], norms.eps, d, cos, sin, bf16);
#pragma unroll
        for (int i = 0; i < 8; i++) q.v[i] *= scale;
        if (newest) { k = turned<H>(r[1], norms.q, w[1], norms.eps, d, cos, sin, bf16); v.unpack(r[2], bf16); }
    }
};
// a lane's next N rows of both caches, `step` apart, on their way
template<int H, int N> struct Rows {
    uint4 k[N], v[N];
    DEV void load(const uint16_t* keys, const uint16_t* values, size_t row, int s0, int end, int step) {
        const int lane = threadIdx.x%32, d = min(lane%LANES<H>*8, H - 8);
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int s = max(0, min(s0 + lane/LANES<H> + n*step, end - 1));
            k[n] = load_x(keys + s*row + d); v[n] = load_x(values + s*row + d);
        }
    }
};
// a warp's share of positions begin…end, `step` rows apart, of which `rows` holds the first. Every group of LANES ends with the whole warp's softmax.
template<int H, int N> DEV Running attend_over(const Head<H>& h, Rows<H, N> rows, const uint16_t* keys, const uint16_t* values, size_t row, int begin, int end, int step, int bf16) {
    const int lane = threadIdx.x%32;
    Running r; r.top = -INFINITY; r.total = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) r.sum.v[i] = 0.f;
    if (h.newest) {
        float score[1] = {h.q.dot(h.k)}; add_up<H>(score);
        if (lane < LANES<H>) { r.top = score[0]; r.total = 1.f; r.sum = h.v; }
    }
    for (int s0 = begin; s0 < end; s0 += N*step) {
        if (s0 > begin) rows.load(keys, values, row, s0, end, step);
        float z[N];
#pragma unroll
        for (int n = 0; n < N; n++) { Eight k; k.unpack(rows.k[n], bf16); z[n] = h.q.dot(k); }
        add_up<H>(z);
#pragma unroll
        for (int n = 0; n < N; n++) if (s0 + lane/LANES<H> + n*step >= end) z[n] = -INFINITY;
        r.add(z, rows.v, bf16);
    }
#pragma unroll
    for (int m = LANES<H>; m < 32; m *= 2) r.join(m);
    return r;
}
template<int H> DEV void keep(float* to, const Running& r, int lane) {   // of a warp
    if (lane >= H/8) return;
#pragma unroll
    for (int i = 0; i < 8; i++) to[lane*8 + i] = r.sum.v[i];
    if (lane == 0) { to[H] = r.top; to[H + 1] = r.total; }
}
template<int H> __global__ void __launch_bounds__(ATTEND_THREADS) attend(const AttendArgs p) {
    constexpr int ROWS = 32/LANES<H>, STEP = ATTEND_THREADS/32*ROWS;   // lanes of a row, rows of a warp and of all warps
    SHARED_BYTES(smem);
    float *warps = (float*)smem, *ranks_parts = warps + ATTEND_THREADS/32*WIDTH<H>;
    const int ranks = cluster_size(), rank = cluster_rank(), head = blockIdx.x/ranks, group = p.heads/p.kv_heads, kv = head/group;
    const int lane = threadIdx.x%32, warp = threadIdx.x/32, d = lane%LANES<H>*8, mine = warp*ROWS + lane/LANES<H>;
    if (ranks > 1) cluster_arrive_first();
    grid_launch_next();
    int pos = (int)*p.at, begin = part(pos, rank, ranks), end = part(pos, rank + 1, ranks);
    const size_t row = (size_t)p.kv_heads*H;                              // numbers of a position
    uint16_t *keys = (uint16_t*)p.keys + kv*H, *values = (uint16_t*)p.values + kv*H;
    if (d%64 == 0) for (int s = begin + mine; s < end; s += STEP) { fetch(keys + s*row + d); fetch(values + s*row + d); }   // what earlier tokens wrote
    grid_wait();
    pos = (int)load_i64(p.at); begin = part(pos, rank, ranks); end = part(pos, rank + 1, ranks);   // now for sure
    auto take = [](auto& r, int n, auto at) {                            // all on their way at once
#pragma unroll
        for (int i = 0; i < 3; i++) if (i < n) r[i] = load_x(at(i));
    };
    Head<H> h; h.load(take, (const uint16_t*)p.qkv, p.heads, p.kv_heads, head, kv, d, (const float*)p.cos + (size_t)pos*(H/2), (const float*)p.sin + (size_t)pos*(H/2), p.norms, p.scale, p.bf16, rank == ranks - 1 && warp == 0);
    if (h.newest && lane < H/8 && head%group == 0) { *(uint4*)(keys + pos*row + d) = h.k.packed(p.bf16); *(uint4*)(values + pos*row + d) = h.v.packed(p.bf16); }
    Rows<H, AHEAD> rows; rows.load(keys, values, row, begin + warp*ROWS, end, STEP);
    keep<H>(warps + warp*WIDTH<H>, attend_over(h, rows, keys, values, row, begin + warp*ROWS, end, STEP, p.bf16), lane);
    __syncthreads();
    if (ranks > 1) cluster_wait();
    float top, total;
    for (int i = threadIdx.x; i < H; i += ATTEND_THREADS) {
        const float sum = joined<H>([=](int j) { return warps[j]; }, ATTEND_THREADS/32, i, top, total);
        float* to = ranks_parts + rank*WIDTH<H>;
        store_in_rank(to + i, 0, sum);
        if (i == 0) { store_in_rank(to + H, 0, top); store_in_rank(to + H + 1, 0, total); }
    }
    if (ranks > 1) { cluster_arrive(); cluster_wait(); } else __syncthreads();
    if (rank) return;
    for (int i = threadIdx.x; i < H; i += ATTEND_THREADS) {
        const float sum = joined<H>([=](int j) { return ranks_parts[j]; }, ranks, i, top, total)/total;
        ((uint16_t*)p.y)[head*H + i] = p.bf16 ? float_to_bf16(sum) : float_to_half(sum);
    }
}
