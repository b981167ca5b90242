// One token through all layers and the last norm in one launch. A thread block per processor stays; one warp of it copies the weights of all layers, one piece after the
// other, into a ring, and never waits for activations; the others do, five times a layer: they compute q k v | attention | o | gate, up | down.
// What one step hands to the next goes through memory as numbers of 16 bits. A place that waits for one holds NOT_YET, which is never sent: whoever
// needs the number reads it again until it is another. So a block waits for what it reads, not for all others, and the news is the number itself.
constexpr int TOKEN_MODE = E4M3 ? FP16 : INT16;
constexpr int MOST_PARTS = 4, MOST_SPLITS = 8;                          // of an input; of a head's positions
constexpr int COPIERS = 4;                                               // warps of a block that don't compute; the first of them copies
constexpr uint32_t NOT_YET = 0x8000;                                     // a negative zero, of which the sender makes a positive one; the least of all integers of 16 bits
constexpr int PIECE = 3;                                                 // units of a row of tiles that are copied, and multiplied by a warp, at a time
struct Matrix { int tiles, KB, ranks; };                                 // ranks: parts of the input, each another block's
struct LayerArgs { const uint8_t* units[4]; const void *norm[2], *head_norm[2], *bias[4]; void *keys, *values; float factor[4][3]; };   // q k v, o, gate and up, down; head_norm: of queries and keys, or null
struct TokenArgs {
    const LayerArgs* layers; const void *x, *norm; void* y; const float *cos, *sin; const long long* at; unsigned* turn;
    uint16_t* sent[5];                                                   // results of m[0…3], (3, ranks, 16 tiles), and of attention, (3, heads, splits, 2 H)
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
    int shares, layers, stream, angles, row, x, steps, sums, warps, ring, bytes;
    TokenLayout(const TokenArgs& p, int ctas, int warps_, int rows) {
        int at = 16*p.slots, nk = 0, sums_ = 0;
        auto put = [&](int size) { int here = at; at += (size + 127)/128*128; return here; };
        at = (at + 127)/128*128;
        for (const Matrix& m : p.m) {
            const int n = (m.KB + m.ranks - 1)/m.ranks;
            nk = n > nk ? n : nk; sums_ = max(sums_, (m.tiles + ctas/m.ranks - 1)/(ctas/m.ranks)*((n + PIECE - 1)/PIECE)*16);
        }
        shares = put(4*sizeof(Share)); layers = put(p.n_layers*sizeof(LayerArgs)); stream = put(4*p.D); angles = put(4*p.H); row = put(nk*256); x = put(nk*rows*4*X_WORDS); steps = put(4*nk); sums = put(4*sums_);
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
DEV uint16_t sendable(uint32_t v) { return v == NOT_YET ? 0 : v; }
DEV uint32_t sendable_float(float f) { const uint32_t v = __float_as_uint(f); return v >> 16 == NOT_YET ? 0 : v + ((v & 0xffff) == NOT_YET); }
// the block's consumers
template<int MODE, int H, int BF16> struct Consumer {
    static constexpr int ROWS = 32/LANES<H>;                             // of the cache that a warp reads at a time
    const TokenArgs& p; uint8_t *smem, *ring;
    int threads, lane, warp, warps, slot, turn, copy, pos, head, split, kv, begin, end; bool first_of_kv;   // slot, turn: of the ring, where the next pieces are; copy: of the places, this layer's
    float *steps, *sums, *parts, *squares, *angles; float4* stream; uint16_t* row; uint32_t* x; Share* shares; LayerArgs* layers;

    DEV Consumer(const TokenArgs& p_, const TokenLayout& at, uint8_t* smem_) : p(p_), smem(smem_) {
        threads = blockDim.x - 32*COPIERS; lane = threadIdx.x%32; warp = threadIdx.x/32; warps = threads/32; slot = turn = 0; copy = load_int(p.turn);
        steps = (float*)(smem + at.steps); stream = (float4*)(smem + at.stream); angles = (float*)(smem + at.angles); sums = (float*)(smem + at.sums); parts = (float*)(smem + at.warps); squares = parts + warps*WIDTH<H>;
        row = (uint16_t*)(smem + at.row); x = (uint32_t*)(smem + at.x); ring = smem + at.ring; shares = (Share*)(smem + at.shares); layers = (LayerArgs*)(smem + at.layers);
        const int group = p.n_heads/p.kv_heads;
        pos = (int)load_i64(p.at); head = blockIdx.x/p.splits; kv = head/group; first_of_kv = head%group == 0;
        split = blockIdx.x%p.splits; begin = part(pos, split, p.splits) + warp*ROWS; end = part(pos, split + 1, p.splits);
        for (int i = threadIdx.x; i < H; i += threads) angles[i] = (i < H/2 ? p.cos : p.sin)[(size_t)pos*(H/2) + i%(H/2)];
        if (threadIdx.x < 4) shares[threadIdx.x] = share_of(p.m[threadIdx.x]);
        for (int i = threadIdx.x; i < p.n_layers*(int)sizeof(LayerArgs)/4; i += threads) ((uint32_t*)layers)[i] = ((const uint32_t*)p.layers)[i];
    }
    DEV void meet() { sync_some(threads); }
    // what layer l of this token sends goes to places (turn + l) mod 3: every block has read `turn` when the last one sets it for the next token
    DEV void take_turn() {
        if (threadIdx.x == 0 && add_release(p.turn + 1, 1) == gridDim.x - 1) { p.turn[1] = 0; p.turn[0] = (copy + p.n_layers)%3; }
    }
    DEV int before(int n) const { return (copy + 3 - n)%3; }             // the places n layers ago
    DEV uint16_t* places(int m, int copy) const { return p.sent[m] + copy*p.m[m].ranks*p.m[m].tiles*16; }
    DEV uint16_t* own(int m, int copy) const { return places(m, copy) + blockIdx.x%p.m[m].ranks*p.m[m].tiles*16; }   // of this block's part of the input
    DEV uint16_t* heads(int copy) const { return p.sent[4] + copy*p.n_heads*p.splits*2*H; }
    DEV uint16_t number_to_send(float v) const { return sendable((BF16 ? floats_to_bf16(v, 0.f) : floats_to_half2(v, 0.f)) & 0xffff); }
    // n times eight numbers, each from where `at` says, once they are all there
    template<int N, class F> DEV void take(uint4 (&v)[N], int n, F at) const {
        bool again;
        do {
            uint32_t low = 0;
#pragma unroll
            for (int i = 0; i < N; i++) if (i < n) v[i] = load_now(at(i)); else v[i] = make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int i = 0; i < N; i++) low = least(least(low, least(v[i].x, v[i].y)), least(v[i].z, v[i].w));
            again = ((low & 0xffff) == NOT_YET || low >> 16 == NOT_YET) && !(p.flags & NO_WAIT);
        } while (again);
    }
    // A block clears its own places a layer after their use, those of down two layers after. It has then read all that down sent in the layer before, for
    // which all gate and up had been read. Every block has rows of those (the host sees to it), so every block had sent them, and before that had read what
    // it needs of that layer's q k v, attention and o, and of down's of the layer before: nobody reads these places any more. Whoever waits for the next
    // number in one of them has read all of a later down, so some gate and up that this block sent after clearing. The clearing warp goes on to the barrier
    // in front of those only when the zeros are in L2, where all these loads and stores go, and a load is not begun before the one it depends on is tested.
    // A kernel's end stands for all of it.
    DEV void clear() {
        if (warp != warps - 1) return;
        const uint4 empty = make_uint4(NOT_YET*0x10001, NOT_YET*0x10001, NOT_YET*0x10001, NOT_YET*0x10001);
        auto fill = [&](uint16_t* at, int n) { for (int i = 8*lane; i < n; i += 8*32) send(at + i, empty); };
#pragma unroll
        for (int m = 0; m < 4; m++) fill(own(m, before(m == 3 ? 2 : 1)) + shares[m].tile*16, shares[m].tiles*16);
        if (head < p.n_heads) fill(heads(before(1)) + blockIdx.x*2*H, 2*H);
        sent_before();
    }
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
#pragma unroll 4
            for (int b = 0; b < s.pieces; b++) v += sums[(i/16*s.pieces + b)*16 + i%16];
            write(s.tile*16 + i, v);
        }
        warp_sync();                                                     // no lane waits for what another has yet to send
    }
    // the stream plus what the last matrix added (in the first layer none has), kept for the next addition; times the norm's weights it is `put`, its squares in `squares`
    template<class F> DEV void normed(int m, const uint16_t* added, const void* bias, const void* norm, F put) {
        const int ranks = p.m[m].ranks, stride = p.m[m].tiles*16;
        float sum = 0;
        for (int k = 8*threadIdx.x; k < p.D; k += 8*threads) {
            const uint4 w_ = load_x((const uint16_t*)norm + k), b_ = bias ? load_x((const uint16_t*)bias + k) : make_uint4(0, 0, 0, 0);
            Eight v, w, b;
            if (added) {
                uint4 parts[MOST_PARTS];
                take(parts, ranks, [&](int r) { return added + r*stride + k; });
                v.set(stream[k/8], stream[(p.D + k)/8]);
#pragma unroll
                for (int r = 0; r < MOST_PARTS; r++) { Eight e; e.unpack(parts[r], BF16); v.plus(e); }
            }
            else v.load(p.x, k, BF16);
            w.unpack(w_, BF16); b.unpack(b_, BF16);
            v.plus(b);
            stream[k/8] = {v.v[0], v.v[1], v.v[2], v.v[3]}; stream[(p.D + k)/8] = {v.v[4], v.v[5], v.v[6], v.v[7]};
            sum += v.dot(v);
#pragma unroll
            for (int i = 0; i < 8; i++) v.v[i] *= w.v[i];
            put(k, v);
        }
#pragma unroll
        for (int d = 16; d; d /= 2) sum += shfl_xor(sum, d);
        if (lane == 0) squares[warp] = sum;
    }
    DEV void normed_row(int m, const uint16_t* added, const void* bias, const void* norm) {
        normed(m, added, bias, norm, [this](int k, const Eight& v) { put_row(k, v); });
        put_zeros(p.D, (p.D + 127)/128*128);
    }
    DEV float factor() const {                                           // of a row, by the norm
        float sum = 0;
#pragma unroll 4
        for (int w = 0; w < warps; w++) sum += squares[w];
        return inverse_sqrt(sum/p.D + p.eps);
    }
    DEV float factor_at(int m, const LayerArgs& a, int o) const { return a.factor[m][(o >= p.edge[m][0]) + (o >= p.edge[m][1])]; }
    DEV float bias_at(int m, const LayerArgs& a, int o, int O) const { return a.bias[m] && o < O ? number(a.bias[m], o, BF16) : 0.f; }
    DEV void outputs(int m, const LayerArgs& a, const Share& s, int O) {   // finished ones, of q k v or gate, up
        const int mine = s.tile*16 + threadIdx.x;                        // the row this thread will write, if there are no more than threads
        uint16_t* to = own(m, copy);
        const float norm = factor(), its = factor_at(m, a, mine), its_bias = bias_at(m, a, mine, O);
        multiply(s, [&](int o, float v) {
            if (o >= O) return;
            v = v*norm*(o == mine ? its : factor_at(m, a, o)) + (o == mine ? its_bias : bias_at(m, a, o, O));
            send(to + o, number_to_send(v));
        });
    }
    DEV void sums_of(int m, const LayerArgs& a, const Share& s) {        // a part of them, of o or down
        uint16_t* to = own(m, copy);
        const float f = a.factor[m][0];
        multiply(s, [&](int o, float v) { if (o < p.D) send(to + o, number_to_send(v*f)); });
    }
    typedef Rows<H, 3> First;                                            // more would not fit the registers
    DEV bool attends() const { return head < p.n_heads && !(p.flags & NO_ATTENTION); }
    DEV void first_rows(const LayerArgs& a, First& rows) const {      // what earlier tokens wrote needs no waiting for this one's
        if (!attends()) return;
        rows.load((uint16_t*)a.keys + kv*H, (uint16_t*)a.values + kv*H, (size_t)p.kv_heads*H, begin, end, warps*ROWS);
    }
    DEV void attention(const LayerArgs& a, const First& rows) {
        if (!attends()) return;
        const int d = lane%LANES<H>*8;
        const size_t width = (size_t)p.kv_heads*H;
        uint16_t *keys = (uint16_t*)a.keys + kv*H, *values = (uint16_t*)a.values + kv*H;
        auto get = [this](auto& v, int n, auto at) { take(v, n, at); };
        Head<H> h; h.load(get, places(0, copy), p.n_heads, p.kv_heads, head, kv, d, angles, angles + H/2, {a.head_norm[0], a.head_norm[1], p.eps}, p.scale, BF16, split == p.splits - 1 && warp == 0);
        if (h.newest && lane < H/8 && first_of_kv) { *(uint4*)(keys + pos*width + d) = h.k.packed(BF16); *(uint4*)(values + pos*width + d) = h.v.packed(BF16); }
        keep<H>(parts + warp*WIDTH<H>, attend_over(h, rows, keys, values, width, begin, end, warps*ROWS, BF16), lane);
        meet();
        uint16_t* to = heads(copy) + blockIdx.x*2*H;
        for (int i = threadIdx.x; i < H; i += threads) {                 // four means, and the logarithm of what they weigh, twice to fill 16 bytes
            float top, total;
            const float sum = joined<H>([this](int j) { return parts[j]; }, warps, i, top, total), mean = total > 0 ? sum/total : 0.f;
            const float b = shfl_xor(mean, 1), c = shfl_xor(mean, 2), d = shfl_xor(mean, 3);
            const uint32_t w = sendable_float(total > 0 ? top + fast_log(total) : -INFINITY), lo = floats_to_half2(mean, b), hi = floats_to_half2(c, d);
            auto both = [](uint32_t v) { return sendable(v & 0xffff) | (uint32_t)sendable(v >> 16) << 16; };
            if (i%4 == 0) send(to + 2*i, make_uint4(both(lo), both(hi), w, w));
        }
        warp_sync();
    }
    DEV void fetch_ahead(int l) const {                                  // into L2: a layer's norms, and what attention will read of its cache
        constexpr int LINES = (H + 63)/64;                               // of 128 bytes
        if (l >= p.n_layers) return;
        const LayerArgs& a = layers[l];
        if ((int)blockIdx.x == l%(int)gridDim.x) for (int k = threadIdx.x*64; k < p.D; k += threads*64) { fetch((const uint16_t*)a.norm[0] + k); fetch((const uint16_t*)a.norm[1] + k); }
        if (!attends()) return;
        const int begin = part(pos, split, p.splits), n = end - begin;
        const uint16_t *keys = (const uint16_t*)a.keys, *values = (const uint16_t*)a.values;
        if (a.head_norm[0] && threadIdx.x < LINES) { fetch((const uint16_t*)a.head_norm[0] + threadIdx.x*64); fetch((const uint16_t*)a.head_norm[1] + threadIdx.x*64); }
        for (int i = threadIdx.x; i < n*LINES; i += threads) {
            const size_t k = ((size_t)(begin + i/LINES)*p.kv_heads + kv)*H + i%LINES*64;
            fetch(keys + k); fetch(values + k);
        }
    }
    DEV void heads_row(const Share& s) {                                 // attention's result: the parts of its softmaxes, joined
        if (!s.tiles) return;
        const uint16_t* from = heads(copy);
        for (int k = 4*threadIdx.x; k < s.nk*128; k += 4*threads) {
            const int i = s.k0*128 + k, n = i/H < p.n_heads && !(p.flags & NO_ATTENTION) ? p.splits : 0;
            uint4 v[MOST_SPLITS];
            take(v, n, [&](int j) { return from + (i/H*p.splits + j)*2*H + i%H*2; });
            float top = -INFINITY, total = 0, sum[4] = {};
#pragma unroll
            for (int j = 0; j < MOST_SPLITS; j++) if (j < n) top = fmaxf(top, __uint_as_float(v[j].z));
#pragma unroll
            for (int j = 0; j < MOST_SPLITS; j++) {
                if (j >= n) continue;
                const float w = Running::weight(__uint_as_float(v[j].z), top);
                total += w; sum[0] += w*lo_half(v[j].x); sum[1] += w*hi_half(v[j].x); sum[2] += w*lo_half(v[j].y); sum[3] += w*hi_half(v[j].y);
            }
            const float r = n ? 1.f/total : 0.f;
            *(uint2*)(row + k) = make_uint2(floats_to_half2(sum[0]*r, sum[1]*r), floats_to_half2(sum[2]*r, sum[3]*r));
        }
    }
    DEV void gated_row(const Share& s) {
        if (!s.tiles) return;
        const uint16_t* from = places(2, copy);
        for (int k = 8*threadIdx.x; k < s.nk*128; k += 8*threads) {
            const int i = s.k0*128 + k;
            if (i >= p.F) { *(uint4*)(row + k) = make_uint4(0, 0, 0, 0); continue; }
            uint4 both[2];
            take(both, 2, [&](int j) { return from + j*p.F + i; });
            Eight g, u; g.unpack(both[0], BF16); u.unpack(both[1], BF16);
#pragma unroll
            for (int j = 0; j < 8; j++) g.v[j] = silu(g.v[j])*u.v[j];
            put_row(k, g);
        }
    }
    DEV const uint16_t* down_before(int l) const { return l ? places(3, before(1)) : nullptr; }
    DEV void layer(int l) {
        const LayerArgs& a = layers[l];
        normed_row(3, down_before(l), l ? layers[l-1].bias[3] : nullptr, a.norm[0]);
        quantize(shares[0]); outputs(0, a, shares[0], (p.n_heads + 2*p.kv_heads)*H);
        First rows; first_rows(a, rows);
        attention(a, rows);
        heads_row(shares[1]); quantize(shares[1]); clear(); sums_of(1, a, shares[1]);
        normed_row(1, places(1, copy), a.bias[1], a.norm[1]);
        quantize(shares[2]); outputs(2, a, shares[2], 2*p.F);
        gated_row(shares[3]); quantize(shares[3]); sums_of(3, a, shares[3]);
        fetch_ahead(l + 1);
        copy = (copy + 1)%3;
    }
    DEV void finish() {                                                  // the last norm: every block has the stream, one writes it
        if (blockIdx.x) return;
        normed(3, down_before(p.n_layers), layers[p.n_layers - 1].bias[3], p.norm, [this](int k, const Eight& v) {
            stream[k/8] = {v.v[0], v.v[1], v.v[2], v.v[3]}; stream[(p.D + k)/8] = {v.v[4], v.v[5], v.v[6], v.v[7]};
        });
        meet();
        const float f = factor();
        for (int k = 8*threadIdx.x; k < p.D; k += 8*threads) {
            Eight v; v.set(stream[k/8], stream[(p.D + k)/8]);
#pragma unroll
            for (int i = 0; i < 8; i++) v.v[i] *= f;
            *(uint4*)((uint16_t*)p.y + k) = v.packed(BF16);
        }
    }
};
template<int MODE, int H, int BF16> __global__ void __launch_bounds__(640, 1) token(const TokenArgs p, const TokenLayout at) {
    SHARED_BYTES(smem);
    if (threadIdx.x < 2*p.slots) bar_init((uint64_t*)smem + threadIdx.x, 1);
    __syncthreads();
    const int consumers = blockDim.x - 32*COPIERS;
    if ((int)threadIdx.x >= consumers) {
        fewer_registers<24>();
        if ((int)threadIdx.x == consumers && !(p.flags & NO_WEIGHTS)) copy_weights(p, at, smem);
        return;
    }
    more_registers<112>();                                               // with the most warps a scheduler has five: 4 x 112 + 24 registers a lane, of the 5 x 96 they began with
    grid_wait();
    Consumer<MODE, H, BF16> c(p, at, smem);
    c.meet(); c.take_turn(); c.fetch_ahead(0);
    for (int l = 0; l < p.n_layers; l++) c.layer(l);
    c.finish();
}
template<int MODE, int H> static const void* pick_token(int bf16) { return bf16 ? (const void*)token<MODE, H, 1> : (const void*)token<MODE, H, 0>; }
template<int MODE> static const void* pick_token(int H, int bf16) {
#define TOKEN_OF(N) H == N ? pick_token<MODE, N>(bf16) :
    return EACH_H(TOKEN_OF) nullptr;
}
