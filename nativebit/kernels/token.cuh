// One token through all layers in one launch. A thread block per processor stays; one warp of it copies the weights of all layers, one piece after the
// other, into a ring, and never waits for activations; the others do, five times a layer: they compute q k v | attention | o | gate, up | down, and
// between two of those every block waits until all have written.
constexpr int TOKEN_MODE = E4M3 ? FP16 : INT16;
constexpr int MOST_PARTS = 4, MOST_SPLITS = 8;                          // of an input; of a head's positions
constexpr int PIECE = 3;                                                 // units of a row of tiles that are copied, and multiplied by a warp, at a time
struct Matrix { int tiles, KB, ranks; };                                 // ranks: parts of the input, each another block's
struct LayerArgs { const uint8_t* units[4]; const void *norm[2], *bias[4]; void *keys, *values; float factor[4][3]; };   // q k v, o, gate and up, down
struct TokenArgs {
    const LayerArgs* layers; const void* x; void* y; const float *cos, *sin; const long long* at;
    float *stream, *o, *down, *heads; uint16_t *qkv, *gate_up; unsigned* sync;   // the residual stream twice (2, D); parts of sums (ranks, D); of softmaxes (heads, splits, H + 4)
    Matrix m[4]; int n_layers, D, F, n_heads, kv_heads, H, splits, edge[4][2]; float eps, scale; int bf16, slots, flags;
};
enum TokenFlags { NO_ATTENTION = 4, NO_WEIGHTS = 8 };                   // NO_WEIGHTS: nobody copies them, nobody waits for them
struct Share {                                                           // of a matrix: a block's
    int tile, tiles, k0, nk, pieces, inverse;                            // pieces: of a tile; inverse: of their number, times 2^20
    DEV int tile_of(int piece) const { return piece*inverse >> 20; }     // a division takes thirty instructions
};
DEV Share share_of(const Matrix& m) {
    const int groups = gridDim.x/m.ranks, group = blockIdx.x/m.ranks, rank = blockIdx.x%m.ranks;
    Share s;
    s.tile = part(m.tiles, group, groups); s.tiles = group < groups ? part(m.tiles, group + 1, groups) - s.tile : 0;
    s.k0 = part(m.KB, rank, m.ranks); s.nk = part(m.KB, rank + 1, m.ranks) - s.k0; s.pieces = (s.nk + PIECE - 1)/PIECE;
    s.inverse = ((1 << 20) + s.pieces - 1)/max(s.pieces, 1);
    return s;
}
struct TokenLayout {   // of shared memory, in bytes
    int shares, layers, row, x, steps, sums, warps, ring, bytes;
    TokenLayout(const TokenArgs& p, int ctas, int warps_, int rows) {
        int at = 16*p.slots, nk = 0, sums_ = 0;
        auto put = [&](int size) { int here = at; at += (size + 127)/128*128; return here; };
        at = (at + 127)/128*128;
        for (const Matrix& m : p.m) {
            const int n = (m.KB + m.ranks - 1)/m.ranks;
            nk = n > nk ? n : nk; sums_ = max(sums_, (m.tiles + ctas/m.ranks - 1)/(ctas/m.ranks)*((n + PIECE - 1)/PIECE)*16);
        }
        shares = put(4*sizeof(Share)); layers = put(p.n_layers*sizeof(LayerArgs)); row = put(nk*256); x = put(nk*rows*4*X_WORDS); steps = put(4*nk); sums = put(4*sums_);
        warps = put(4*(warps_*(p.H + 4) + 32)); ring = at; bytes = at + p.slots*PIECE*UNIT;
    }
};
DEV void copy_weights(const TokenArgs& p, const TokenLayout& at, uint8_t* smem) {
    uint64_t *full = (uint64_t*)smem, *empty = full + p.slots;
    int slot = 0, turn = 1;                                              // in the first lap nothing has to be waited for
    Share shares[4];
#pragma unroll
    for (int m = 0; m < 4; m++) shares[m] = share_of(p.m[m]);
    for (int l = 0; l < p.n_layers; l++)
#pragma unroll
        for (int m = 0; m < 4; m++) {
            const Share& s = shares[m];
            const uint8_t* units = p.layers[l].units[m] + ((size_t)s.tile*p.m[m].KB + s.k0)*UNIT;
            for (int t = 0; t < s.tiles; t++, units += (size_t)p.m[m].KB*UNIT)
                for (int b = 0; b < s.nk; b += PIECE) {
                    const int bytes = min(PIECE, s.nk - b)*UNIT;
                    bar_wait(empty + slot, turn);
                    bar_expect(full + slot, bytes);
                    bulk_load(smem + at.ring + slot*PIECE*UNIT, units + b*UNIT, bytes, full + slot);
                    if (++slot == p.slots) { slot = 0; turn ^= 1; }
                }
        }
}
struct Ends { float top, total; };
// the block's consumers
template<int MODE, int H, int BF16> struct Consumer {
    const TokenArgs& p; uint8_t *smem, *ring;
    int threads, lane, warp, warps, slot, turn, phase, pos, head, split, kv, begin, end; bool first_of_kv;   // slot, turn: of the ring, where the next pieces are; phase: waits of all blocks so far
    float *steps, *sums, *parts, *squares; uint16_t* row; uint32_t* x; Share* shares; LayerArgs* layers;

    DEV Consumer(const TokenArgs& p_, const TokenLayout& at, uint8_t* smem_) : p(p_), smem(smem_) {
        threads = blockDim.x - 32; lane = threadIdx.x%32; warp = threadIdx.x/32; warps = threads/32; slot = turn = phase = 0;
        steps = (float*)(smem + at.steps); sums = (float*)(smem + at.sums); parts = (float*)(smem + at.warps); squares = parts + warps*WIDTH<H>;
        row = (uint16_t*)(smem + at.row); x = (uint32_t*)(smem + at.x); ring = smem + at.ring; shares = (Share*)(smem + at.shares); layers = (LayerArgs*)(smem + at.layers);
        const int group = p.n_heads/p.kv_heads;
        pos = (int)load_i64(p.at); head = blockIdx.x/p.splits; kv = head/group; first_of_kv = head%group == 0;
        split = blockIdx.x%p.splits; begin = part(pos, split, p.splits) + warp*(256/H); end = part(pos, split + 1, p.splits);
        if (threadIdx.x < 4) shares[threadIdx.x] = share_of(p.m[threadIdx.x]);
        for (int i = threadIdx.x; i < p.n_layers*(int)sizeof(LayerArgs)/4; i += threads) ((uint32_t*)layers)[i] = ((const uint32_t*)p.layers)[i];
    }
    DEV void meet() { sync_some(threads); }
    template<class F> DEV void all_meet(F meanwhile) {                   // of all blocks
        meet();
        phase++;
        if (threadIdx.x == 0) signal_release(p.sync);
        meanwhile();
        if (threadIdx.x == 0 && !(p.flags & NO_WAIT)) while (load_acquire(p.sync) < phase*gridDim.x) {}
        meet();
    }
    DEV void all_meet() { all_meet([] {}); }
    DEV void put_row(int k, const Eight& v) { *(uint4*)(row + k) = v.packed(0); }   // of this block's part of the input, as fp16
    DEV void put_zeros(int from, int to) {
        for (int k = from + 8*threadIdx.x; k < to; k += 8*threads) *(uint4*)(row + k) = make_uint4(0, 0, 0, 0);
    }
    DEV void quantize(const Share& s) {                                  // the row as the products want it
        meet();
        const int total = s.nk*8;
        for (int first = threadIdx.x - lane; first < total; first += threads) {
            const int i = min(first + lane, total - 1);
            Piece q; const uint4 *r = (const uint4*)(row + i*16), a = r[0], b = r[1];
            q.v[0] = a.x; q.v[1] = a.y; q.v[2] = a.z; q.v[3] = a.w; q.v[4] = b.x; q.v[5] = b.y; q.v[6] = b.z; q.v[7] = b.w;
            put_x<MODE>(x, steps, q, x_rows<MODE>(1), 1, 0, i/8, i%8, first + lane < total);
        }
        meet();
    }
    // sums of 16 rows a piece; then `write(row of the matrix, sum)` for every row of the block's tiles
    template<class F> DEV void multiply(const Share& s, F write) {
        uint64_t *full = (uint64_t*)smem, *empty = full + p.slots;
        const int total = s.tiles*s.pieces;
        int mine = slot + warp, its_turn = turn;                         // no more warps than slots: one lap at most between two pieces
        for (int j = warp; j < total; j += warps, mine += warps) {
            if (mine >= p.slots) { mine -= p.slots; its_turn ^= 1; }
            const int b0 = (j - s.tile_of(j)*s.pieces)*PIECE, b1 = min(b0 + PIECE, s.nk);
            const uint8_t* units = ring + mine*PIECE*UNIT - b0*UNIT;
            Tiles<MODE, 1, 1> t; t.clear();
            if (!(p.flags & NO_WEIGHTS)) bar_wait(full + mine, its_turn);
            warp_sync();
            if (p.flags & NO_PRODUCTS) {}
            else if (b1 - b0 == PIECE) {
#pragma unroll
                for (int b = 0; b < PIECE; b++) t.step(units, 0, x, steps, b0 + b, 1, lane);
            }
            else for (int b = b0; b < b1; b++) t.step(units, 0, x, steps, b, 1, lane);
            t.store(sums + j*16, 0, 16, 1, lane);
            warp_sync();
            if (lane == 0 && !(p.flags & NO_WEIGHTS)) bar_arrive(empty + mine);
        }
        for (slot += total; slot >= p.slots; slot -= p.slots) turn ^= 1;
        meet();
        for (int i = threadIdx.x; i < s.tiles*16; i += threads) {
            float v = 0;
            for (int b = 0; b < s.pieces; b++) v += sums[(i/16*s.pieces + b)*16 + i%16];
            write(s.tile*16 + i, v);
        }
    }
    // the stream plus what the layer's last matrix added: kept for the next addition, times the norm's weights in the row; its squares in `squares`
    DEV void normed(const float* stream, float* next, const float* added, int ranks, const void* bias, const void* norm) {
        float sum = 0;
        int n = 0;
        for (int k = 8*threadIdx.x; k < p.D; k += 8*threads, n++) {
            const uint4 w_ = load_x((const uint16_t*)norm + k), b_ = bias ? load_x((const uint16_t*)bias + k) : make_uint4(0, 0, 0, 0);
            float4 more[MOST_PARTS][2];
#pragma unroll
            for (int r = 0; r < MOST_PARTS; r++)
#pragma unroll
                for (int i = 0; i < 2; i++) if (r < ranks) more[r][i] = load_float4(added + r*p.D + k + 4*i); else more[r][i] = {0.f, 0.f, 0.f, 0.f};
            Eight v, w, b;
            if (stream) v.set(load_float4(stream + k), load_float4(stream + k + 4)); else v.load(p.x, k, BF16);
            w.unpack(w_, BF16); b.unpack(b_, BF16);
#pragma unroll
            for (int r = 0; r < MOST_PARTS; r++) { Eight m; m.set(more[r][0], more[r][1]); v.plus(m); }
            v.plus(b);
            if (min(n, (int)gridDim.x - 1) == (int)blockIdx.x)
#pragma unroll
                for (int i = 0; i < 8; i++) next[k + i] = v.v[i];
            sum += v.dot(v);
#pragma unroll
            for (int i = 0; i < 8; i++) v.v[i] *= w.v[i];
            put_row(k, v);
        }
        put_zeros(p.D, (p.D + 127)/128*128);
#pragma unroll
        for (int d = 16; d; d /= 2) sum += shfl_xor(sum, d);
        if (lane == 0) squares[warp] = sum;
    }
    DEV float factor() const {                                           // of a row, by the norm
        float sum = 0;
#pragma unroll 4
        for (int w = 0; w < warps; w++) sum += squares[w];
        return inverse_sqrt(sum/p.D + p.eps);
    }
    DEV float factor_at(int m, const LayerArgs& a, int o) const { return a.factor[m][(o >= p.edge[m][0]) + (o >= p.edge[m][1])]; }
    DEV float bias_at(int m, const LayerArgs& a, int o, int O) const { return a.bias[m] && o < O ? number(a.bias[m], o, BF16) : 0.f; }
    DEV void outputs(int m, const LayerArgs& a, const Share& s, uint16_t* to, int O) {   // finished ones, of q k v or gate, up
        const int mine = s.tile*16 + threadIdx.x;                        // the row this thread will write, if there are no more than threads
        const float its = factor_at(m, a, mine), its_bias = bias_at(m, a, mine, O);
        multiply(s, [&](int o, float v) {
            if (o >= O) return;
            v = v*factor()*(o == mine ? its : factor_at(m, a, o)) + (o == mine ? its_bias : bias_at(m, a, o, O));
            to[o] = BF16 ? float_to_bf16(v) : float_to_half(v);
        });
    }
    DEV void sums_of(int m, const LayerArgs& a, const Share& s, float* to) {             // a part of them, of o or down
        const int rank = blockIdx.x%p.m[m].ranks;
        const float f = a.factor[m][0];
        multiply(s, [&](int o, float v) { if (o < p.D) to[rank*p.D + o] = v*f; });
    }
    typedef Rows<H, 3> First;                                            // more would not fit the registers
    DEV bool attends() const { return head < p.n_heads && !(p.flags & NO_ATTENTION); }
    DEV void first_rows(const LayerArgs& a, First& rows) const {      // what earlier tokens wrote needs no waiting for this one's
        if (!attends()) return;
        rows.load((uint16_t*)a.keys + kv*H, (uint16_t*)a.values + kv*H, (size_t)p.kv_heads*H, begin, end, warps*(256/H));
    }
    DEV void attention(const LayerArgs& a, const First& rows) {
        constexpr int LANES = H/8;
        if (!attends()) return;
        const int d = lane%LANES*8;
        const size_t width = (size_t)p.kv_heads*H;
        uint16_t *keys = (uint16_t*)a.keys + kv*H, *values = (uint16_t*)a.values + kv*H;
        Head<H> h; h.load(p.qkv, p.n_heads, p.kv_heads, head, kv, d, p.cos + (size_t)pos*(H/2), p.sin + (size_t)pos*(H/2), BF16, split == p.splits - 1 && warp == 0);
        if (h.newest && lane < LANES && first_of_kv) { *(uint4*)(keys + pos*width + d) = h.k.packed(BF16); *(uint4*)(values + pos*width + d) = h.v.packed(BF16); }
        keep<H>(parts + warp*WIDTH<H>, attend_over(h, rows, keys, values, width, begin, end, warps*(256/H), p.scale, BF16), lane);
        meet();
        float top, total, *to = p.heads + (size_t)(head*p.splits + split)*WIDTH<H>;
        for (int i = threadIdx.x; i < H; i += threads) {
            to[i] = joined<H>([this](int j) { return parts[j]; }, warps, i, top, total);
            if (i == 0) { to[H] = top; to[H + 1] = total; }
        }
    }
    DEV void fetch_ahead(int l) const {                                  // into L2: a layer's norms, and what attention will read of its cache
        if (l >= p.n_layers) return;
        const LayerArgs& a = layers[l];
        if ((int)blockIdx.x == l%(int)gridDim.x) for (int k = threadIdx.x*64; k < p.D; k += threads*64) { fetch((const uint16_t*)a.norm[0] + k); fetch((const uint16_t*)a.norm[1] + k); }
        if (!attends()) return;
        const int begin = part(pos, split, p.splits), n = end - begin;
        const uint16_t *keys = (const uint16_t*)a.keys, *values = (const uint16_t*)a.values;
        for (int i = threadIdx.x; i < n*(H/64); i += threads) {
            const size_t k = ((size_t)(begin + i/(H/64))*p.kv_heads + kv)*H + i%(H/64)*64;
            fetch(keys + k); fetch(values + k);
        }
    }
    DEV void heads_row(const Share& s) {                                 // attention's result: the parts of its softmaxes, joined
        for (int k = 4*threadIdx.x; k < s.nk*128; k += 4*threads) {
            const int i = s.k0*128 + k;
            const float* from = p.heads + (size_t)(i/H)*p.splits*WIDTH<H>;
            const bool there = i/H < p.n_heads && !(p.flags & NO_ATTENTION);
            float4 v[MOST_SPLITS]; Ends end[MOST_SPLITS];
#pragma unroll
            for (int n = 0; n < MOST_SPLITS; n++) {                      // all loads on their way at once
                const bool is = there && n < p.splits;
                if (is) { v[n] = load_float4(from + n*WIDTH<H> + i%H); end[n] = {load_float(from + n*WIDTH<H> + H), load_float(from + n*WIDTH<H> + H + 1)}; }
                else { v[n] = {0.f, 0.f, 0.f, 0.f}; end[n] = {-INFINITY, 0.f}; }
            }
            float top = -INFINITY, total = 0; float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
            for (int n = 0; n < MOST_SPLITS; n++) top = fmaxf(top, end[n].top);
#pragma unroll
            for (int n = 0; n < MOST_SPLITS; n++) {
                const float w = Running::weight(end[n].top, top);
                total += w*end[n].total; sum.x += w*v[n].x; sum.y += w*v[n].y; sum.z += w*v[n].z; sum.w += w*v[n].w;
            }
            const float r = there ? 1.f/total : 0.f;
            *(uint2*)(row + k) = make_uint2(floats_to_half2(sum.x*r, sum.y*r), floats_to_half2(sum.z*r, sum.w*r));
        }
    }
    DEV void gated_row(const Share& s) {
        for (int k = 8*threadIdx.x; k < s.nk*128; k += 8*threads) {
            const int i = s.k0*128 + k;
            if (i >= p.F) { *(uint4*)(row + k) = make_uint4(0, 0, 0, 0); continue; }
            const uint4 g_ = load_x(p.gate_up + i), u_ = load_x(p.gate_up + p.F + i);
            Eight g, u; g.unpack(g_, BF16); u.unpack(u_, BF16);
#pragma unroll
            for (int j = 0; j < 8; j++) g.v[j] = silu(g.v[j])*u.v[j];
            put_row(k, g);
        }
    }
    DEV void layer(int l) {
        const LayerArgs& a = layers[l];
        float *first = p.stream, *second = p.stream + p.D;
        normed(l ? second : nullptr, first, p.down, l ? p.m[3].ranks : 0, l ? layers[l-1].bias[3] : nullptr, a.norm[0]);
        quantize(shares[0]); outputs(0, a, shares[0], p.qkv, (p.n_heads + 2*p.kv_heads)*H);
        First rows;
        all_meet([&] { first_rows(a, rows); });
        attention(a, rows);
        all_meet();
        heads_row(shares[1]); quantize(shares[1]); sums_of(1, a, shares[1], p.o);
        all_meet();
        normed(first, second, p.o, p.m[1].ranks, a.bias[1], a.norm[1]);
        quantize(shares[2]); outputs(2, a, shares[2], p.gate_up, 2*p.F);
        all_meet();
        gated_row(shares[3]); quantize(shares[3]); sums_of(3, a, shares[3], p.down);
        all_meet([&] { fetch_ahead(l + 1); });
    }
    DEV void finish() {
        const void* bias = layers[p.n_layers - 1].bias[3];
        for (int k = blockIdx.x*threads + threadIdx.x; k < p.D; k += gridDim.x*threads) {
            float v = load_float(p.stream + p.D + k);
            for (int r = 0; r < p.m[3].ranks; r++) v += load_float(p.down + r*p.D + k);
            if (bias) v += number(bias, k, BF16);
            ((uint16_t*)p.y)[k] = BF16 ? float_to_bf16(v) : float_to_half(v);
        }
        if (threadIdx.x == 0 && add_release(p.sync + 1, 1) == gridDim.x - 1) { p.sync[0] = 0; p.sync[1] = 0; }   // the last one leaves it as it was
    }
};
template<int MODE, int H, int BF16> __global__ void __launch_bounds__(640, 1) token(const TokenArgs p, const TokenLayout at) {
    SHARED_BYTES(smem);
    if (threadIdx.x < 2*p.slots) bar_init((uint64_t*)smem + threadIdx.x, 1);
    __syncthreads();
    if (threadIdx.x/32 == blockDim.x/32 - 1) { if (threadIdx.x%32 == 0 && !(p.flags & NO_WEIGHTS)) copy_weights(p, at, smem); return; }
    grid_wait();
    Consumer<MODE, H, BF16> c(p, at, smem);
    c.meet(); c.fetch_ahead(0);
    for (int l = 0; l < p.n_layers; l++) c.layer(l);
    c.finish();
}
template<int MODE, int H> static const void* pick_token(int bf16) { return bf16 ? (const void*)token<MODE, H, 1> : (const void*)token<MODE, H, 0>; }
template<int MODE> static const void* pick_token(int H, int bf16) { return H == 64 ? pick_token<MODE, 64>(bf16) : H == 128 ? pick_token<MODE, 128>(bf16) : nullptr; }
