// Two to 64 tokens, as fp16 on tensor cores. A thread block has a rectangle of units: some row tiles x some blocks of 128 columns. It goes along
// the columns in stages of DEEP blocks; two rings in shared memory hold the next stages, one of units and one of activations. Copiers fill them and
// workers use them, and nobody waits for the whole block: a place has a barrier that says "full", and one that says "empty". A worker, which is a warp,
// keeps the sums of TJ tiles and all tokens to the end, and takes one block of each stage; one reduction adds the DEEP workers of a tile, and a cluster's blocks.
//
// Activations are copied as they are, a box of 64 columns x all tokens at a time: the order of its swizzle is that in which products of warpgroups
// (on Hopper) and `ldmatrix` (elsewhere) read their second operand. So they are neither converted nor rearranged; what is bf16 becomes fp16 before, by `halve`.
enum FewFlags { NO_TOKENS = 4 };   // beside NO_PRODUCTS and NO_WAIT: activations are not read
constexpr int FEW_BATCH = 2;   // of products with 16 columns, whose weights are looked up together
constexpr int FEW_COPIERS = ARCH >= 90 ? 1 : 4;   // warps

// Shared memory of a block, 1024 bytes of barriers in front; weights go first: they may be asked for before the activations are there
struct Rings {
    int stages, x, x_slots, x_bytes, units, slots, slot_bytes, steps, step_bytes, parts, bytes;   // steps: scales of the activations, as integers
    Rings(int tiles, int blocks, int M, int NT, int deep, int ranks, int room, int ahead, int planes) {   // ahead: bytes of activations that should be on their way
        stages = (blocks + deep - 1)/deep; x_bytes = deep*NT*2048; step_bytes = planes ? deep*NT*32 : 0; slot_bytes = (tiles*deep*UNIT + 127)/128*128;
        const int least = min(stages, 2), most = min(stages, 31), sums = 4*deep*M*(16*tiles + 4);
        const int sent = ranks > 1 ? 4*ranks*M*16*((tiles + ranks - 1)/ranks) : 0;   // (rank, token, row) of the tiles that this block writes
        const int both = x_bytes + step_bytes;
        room -= 1152 + sent;
        const int wanted = min(most, max(least, min((ahead + x_bytes - 1)/x_bytes, (room - least*slot_bytes)/both)));
        slots = min(most, (room - wanted*both)/slot_bytes);
        x_slots = slots < least ? 0 : min(most, (room - slots*slot_bytes)/both);
        if (planes) slots = x_slots = min(most, room/(slot_bytes + both));   // a place has both
        x = 1024; units = x + x_slots*x_bytes; steps = units + slots*slot_bytes;
        parts = (max(steps + x_slots*step_bytes, x + sums) + 127)/128*128; bytes = parts + sent;   // sums lie where the rings were
    }
};
struct FewArgs {
    const uint8_t* units; const void* x; void* y; int O, I, M, KB, tiles, wide, deep, rank_bits; float scale; int bf16, flags; Rings at;
#ifdef STAMPS
    uint64_t* stamps;
#endif
};
// when a block has got how far, and which processor it is on
enum Stamps { BEGUN, ALLOWED, FIRST_THERE, MULTIPLIED, GATHERED, SENT, ENDED, PROCESSOR, STAMPS_OF_BLOCK };
#ifdef STAMPS
#define STAMP(WHEN, WHAT, VALUE) if ((WHEN) && p.stamps) p.stamps[blockIdx.x*STAMPS_OF_BLOCK + WHAT] = VALUE
#else
#define STAMP(WHEN, WHAT, VALUE)
#endif
struct Rectangle { int tile, tiles, k0, nk, rank; };   // of the row tiles and column blocks; which part of the input
struct Place { int at, turn; DEV void next(int of) { if (++at == of) { at = 0; turn ^= 1; } } };   // in a ring, and how often it was filled before, modulo two
// barriers at the beginning of shared memory, 32 of a kind: places of units and of activations that are full, and that are empty
DEV uint64_t* few_bars(uint8_t* smem, int kind) { return (uint64_t*)smem + 32*kind; }
enum FewBars { FULL, FULL_X, EMPTY, EMPTY_X };

// one of the block's warps that multiply: it has every WIDE-th tile from `row` on, and block `mine` of each stage
struct Worker {
    int lane, row, mine, have, count, stages;   // tiles that there are of its TJ; tiles that it multiplies, as many as its neighbours of a warpgroup; stages that have its block
    DEV Worker(const FewArgs& p, const Rectangle& s, int tj) {
        const int warp = threadIdx.x/32, group = ARCH == 90 ? 4 : 1;
        lane = as_it_is(threadIdx.x%32); mine = warp/p.wide;
        row = ARCH == 90 ? warp%p.wide : (warp + mine)%p.wide;           // in turn, so that those who have less are not all one scheduler's
        have = min(tj, max(0, (s.tiles - row + p.wide - 1)/p.wide));
        count = min(tj, max(0, (s.tiles - row/group*group + p.wide - 1)/p.wide));
        stages = (s.nk - mine + p.deep - 1)/p.deep;
    }
};

// what a worker has, and how it hands places back
template<int NT, int TJ> struct FewSums {   // NT: groups of 8 tokens
    float acc[TJ][NT*4];
    DEV void clear() {
#pragma unroll
        for (int i = 0; i < TJ*NT*4; i++) (&acc[0][0])[i] = 0.f;
    }
    DEV static const uint8_t* unit(const FewArgs& p, const uint8_t* smem, const Rectangle& s, const Worker& w, int slot, int j) {   // one that is not there is read as the last one
        return smem + p.at.units + slot*p.at.slot_bytes + (min(w.row + j*p.wide, s.tiles - 1)*p.deep + w.mine)*UNIT;
    }
    // a place is handed back
    DEV static void give(uint8_t* smem, FewBars kind, const Worker& w, int slot) {
        warp_sync();
        if (w.lane == 0) bar_arrive(few_bars(smem, kind) + slot);
    }
    DEV void wait_only(const FewArgs& p, uint8_t* smem, const Worker& w) {   // NO_PRODUCTS
        Place units = {0, 0}, xs = {0, 0};
        for (int i = 0; i < w.stages; i++) {
            bar_wait(few_bars(smem, FULL) + units.at, units.turn);
            give(smem, EMPTY, w, units.at);
            bar_wait(few_bars(smem, FULL_X) + xs.at, xs.turn);
            give(smem, EMPTY_X, w, xs.at);
            units.next(p.at.slots); xs.next(p.at.x_slots);
        }
    }
    DEV void store(const FewArgs& p, float* sums, int pitch, const Worker& w) {     // sums: (deep, M, pitch)
        sums += w.mine*p.M*pitch;
#pragma unroll
        for (int i = 0; i < TJ*NT*4; i++) {
            const int j = i/4/NT, token = i/4%NT*8 + w.lane%4*2 + i%2, row = (w.row + j*p.wide)*16 + w.lane/4 + i%4/2*8;
            if (token < p.M && j < w.have) sums[token*pitch + row] = (&acc[0][0])[i];
        }
    }
};
template<int NT, int TJ> struct FewTiles : FewSums<NT, TJ> {
    using FewSums<NT, TJ>::acc; using FewSums<NT, TJ>::unit; using FewSums<NT, TJ>::give;
    static constexpr bool AFTER = !E4M3 && NT*TJ <= 4;   // scales multiply a block's sums, or else its weights: fewer instructions, or fewer registers
    DEV static void weights(uint32_t* a, const Lane& u, int s, const uint32_t* scale) {
        weights_f16<true>(a, u, s);
        if constexpr (!E4M3)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            a[i] = half_sub(a[i], 0x64806480u);
            if (!AFTER) a[i] = half_mul(a[i], scale[i%2]);
        }
    }
#if ARCH == 90
    // Products of a warpgroup: four warps bring 16 rows each, of any tile, in registers; the second operand is read where it lies. They run while the warp looks up
    // the next weights; the next unit is read before the last of this one's are waited for.
    template<int N> DEV void multiply(const FewArgs& p, uint8_t* smem, const Rectangle& s, const Worker& w) {
        Place units = {0, 0}, xs = {0, 0};
        Lane u;
        uint32_t scale[2];                                               // twice, as fp16
        auto take = [&](int j) {                                         // the stage's j-th unit into registers
            if (j == 0) bar_wait(few_bars(smem, FULL) + units.at, units.turn);
            const uint8_t* at = unit(p, smem, s, w, units.at, j);
            read_words(u, at, w.lane); read_table(u, at, w.lane, 0x80808080u);
            const uint32_t h = AFTER || E4M3 ? 0 : ((const uint32_t*)(at + INDEX_BYTES + TABLE_BYTES))[w.lane/4];
            scale[0] = prmt(h, 0, 0x1010u); scale[1] = prmt(h, 0, 0x3232u);
            if (j == N - 1) { give(smem, EMPTY, w, units.at); units.next(p.at.slots); }
        };
        take(0);
#pragma unroll 1
        for (int i = 0; i < w.stages; i++, xs.next(p.at.x_slots)) {
            uint8_t* x = smem + p.at.x + xs.at*p.at.x_bytes + w.mine*NT*2048;
#pragma unroll
            for (int j = 0; j < N; j++) {
                const uint32_t low = shfl(matrix_low(x), 0);             // the same for all lanes, as the compiler should know; for each tile anew, or it would copy each descriptor twice
                float sum[NT*4];
                float* to = AFTER ? sum : acc[j];
                uint32_t a[2][FEW_BATCH][4];
#pragma unroll
                for (int b = 0; b < 8/FEW_BATCH; b++) {
                    if (b > 1) wgmma_wait<1>();                          // the registers of two batches ago are free
#pragma unroll
                    for (int q = 0; q < FEW_BATCH; q++) weights(a[b%2][q], u, b*FEW_BATCH + q, scale);
                    if (b == 0 && j == 0) bar_wait(few_bars(smem, FULL_X) + xs.at, xs.turn);
                    wgmma_fence();
#pragma unroll
                    for (int q = 0; q < FEW_BATCH; q++) {
                        const int k = b*FEW_BATCH + q;
                        const uint64_t at = matrix_of(low) + (k/4*NT*64 + k%4*2);
                        if (AFTER && k == 0) Wgmma<8*NT>::template run<false>(to, a[b%2][q], at); else Wgmma<8*NT>::template run<true>(to, a[b%2][q], at);
                    }
                    wgmma_commit();
                }
                const float factor[2] = {u.scale[0], u.scale[1]};
                if (j + 1 < N) take(j + 1); else if (i + 1 < w.stages) take(0);
                wgmma_wait<0>();
#pragma unroll
                for (int k = 0; k < NT*4; k++) {
                    pin(to[k]);
                    if (AFTER) acc[j][k] = fmaf(sum[k], factor[k%4/2], acc[j][k]);
                }
            }
            give(smem, EMPTY_X, w, xs.at);
        }
    }
#else
    struct Units {                                                       // of the worker's tiles
        Lane u[TJ];
        uint32_t scale[TJ][2];
        DEV void read(const FewArgs& p, const uint8_t* smem, const Rectangle& s, const Worker& w, int slot) {
#pragma unroll
            for (int j = 0; j < TJ; j++) {
                const uint8_t* at = unit(p, smem, s, w, slot, j);
                read_words(u[j], at, w.lane); read_table(u[j], at, w.lane, 0x80808080u);
                const uint32_t h = AFTER || E4M3 ? 0 : ((const uint32_t*)(at + INDEX_BYTES + TABLE_BYTES))[w.lane/4];
                scale[j][0] = prmt(h, 0, 0x1010u); scale[j][1] = prmt(h, 0, 0x3232u);
            }
        }
    };
    // N tiles x one block of 128 columns
    template<int N> DEV void step(const Units& u, const uint8_t* x, int lane) {
        float sum[N][NT*4];
#pragma unroll
        for (int i = 0; i < N*NT*4; i++) (&sum[0][0])[i] = 0.f;
        const int row = lane%8, near = row*128 + ((lane/8 ^ row) << 4);  // the lane's row of 16 bytes among four matrices of 8 x 8
#pragma unroll
        for (int q = 0; q < 4; q++) {
            uint32_t b[NT][4];
#pragma unroll
            for (int n = 0; n < NT; n++) load_matrices(b[n], x + (q/2*NT + n)*1024 + (near ^ q%2*64));
#pragma unroll
            for (int j = 0; j < N; j++)
#pragma unroll
                for (int s = 0; s < 2; s++) {
                    uint32_t a[4]; weights(a, u.u[j], 2*q + s, u.scale[j]);
#pragma unroll
                    for (int n = 0; n < NT; n++) mma_f16((AFTER ? sum[j] : acc[j]) + 4*n, a, b[n][2*s], b[n][2*s + 1]);
                }
        }
        if constexpr (AFTER)
#pragma unroll
        for (int i = 0; i < N*NT*4; i++) (&acc[0][0])[i] = fmaf((&sum[0][0])[i], u.u[i/4/NT].scale[i%4/2], (&acc[0][0])[i]);
    }
    template<int N> DEV void multiply(const FewArgs& p, uint8_t* smem, const Rectangle& s, const Worker& w) {
        Place units = {0, 0}, xs = {0, 0};
#pragma unroll 1
        for (int i = 0; i < w.stages; i++) {
            uint8_t* x = smem + p.at.x + xs.at*p.at.x_bytes + w.mine*NT*2048;
            Units u;
            bar_wait(few_bars(smem, FULL) + units.at, units.turn);
            u.read(p, smem, s, w, units.at);
            give(smem, EMPTY, w, units.at);
            bar_wait(few_bars(smem, FULL_X) + xs.at, xs.turn);
            step<N>(u, x, w.lane);
            give(smem, EMPTY_X, w, xs.at);
            units.next(p.at.slots); xs.next(p.at.x_slots);
        }
    }
#endif
};

#if !E4M3
// The same by integers: looked-up entries as they are, and activations of 16 bits as two planes of int8, which `planes` has made: of each block of 128 columns
// the rows of 8 tokens' high bytes, then of their low ones, in the order of the swizzle, and a scale a token. A row's scale is the same in all of a unit, so
// its sums of integers, 256 times those of the high bytes and those of the low ones, become floats once a unit. A place of the ring has units and activations.
template<int NT, int TJ> struct PlaneTiles : FewSums<NT, TJ> {
    using FewSums<NT, TJ>::acc; using FewSums<NT, TJ>::unit; using FewSums<NT, TJ>::give;
    DEV void wait_only(const FewArgs& p, uint8_t* smem, const Worker& w) {   // NO_PRODUCTS
        Place ring = {0, 0};
        for (int i = 0; i < w.stages; i++, ring.next(p.at.slots)) { bar_wait(few_bars(smem, FULL) + ring.at, ring.turn); give(smem, EMPTY, w, ring.at); }
    }
    DEV static void entries(uint32_t* a, const Lane& u, int k) {         // of 32 columns
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const uint32_t* t = u.table[r];
            if constexpr (BITS == 4) {                                   // of either half of the table, then one of the two: 11 instructions for 8 weights
                const uint32_t eight = as_it_is(u.word[r][k] & 0x77777777u), upper = as_it_is((u.word[r][k] >> 1 & 0x44444444u) | 0x32103210u);
                auto four = [&](uint32_t e, uint32_t h) { return prmt(prmt(t[0], t[1%TABLE_REGS], e), prmt(t[2%TABLE_REGS], t[3%TABLE_REGS], e), h); };
                a[r] = four(eight, upper); a[r + 2] = four(eight >> 16, upper >> 16);
            } else {
                const uint32_t eight = as_it_is(selectors(u.word[r], k));
                a[r] = look_up(t, eight); a[r + 2] = look_up(t, eight >> 16);
            }
        }
    }
    DEV static const float* steps(const FewArgs& p, const uint8_t* smem, const Worker& w, int slot) {   // of the lane's tokens
        return (const float*)(smem + p.at.steps + slot*p.at.step_bytes) + w.mine*NT*8 + w.lane%4*(NT == 1 ? 2 : 4);
    }
    template<int G> DEV static void add(float* to, const int* sum, const float* step, const float* factor) {   // of G groups of 8 tokens
#pragma unroll
        for (int n = 0; n < G; n += 2) {
            float s[4];
            if (NT == 1) { const float2 v = *(const float2*)step; s[0] = v.x; s[1] = v.y; }
            else { const float4 v = *(const float4*)(step + 8*n); s[0] = v.x; s[1] = v.y; s[2] = v.z; s[3] = v.w; }
#pragma unroll
            for (int i = 0; i < (NT == 1 ? 4 : 8); i++) {
                const int* c = sum + 8*n + i/4*8 + i%4;
                to[4*n + i] = fmaf((float)(256*c[0] + c[4])*s[i/4*2 + i%2], factor[i%4/2], to[4*n + i]);
            }
        }
    }
#if ARCH == 90
    // A warp starts the products of half a unit and looks up the other half while they run; the next unit is read before it waits for them.
    static constexpr int PASSES = NT*TJ > 4 ? 2 : 1, G = NT/PASSES;      // of the tokens, where registers are few; groups of 8 tokens of a pass
    DEV static void start(int* sum, uint32_t (*a)[4], uint32_t low, int pass, int half) {   // 64 columns
        const uint64_t at = matrix_of(low) + (pass*G*128 + half*4);
        wgmma_fence();
        if (half == 0) WgmmaS8<16*G>::template run<false>(sum, a[0], at); else WgmmaS8<16*G>::template run<true>(sum, a[0], at);
        WgmmaS8<16*G>::template run<true>(sum, a[1], at + 2);
        wgmma_commit();
    }
    template<int N> DEV void multiply(const FewArgs& p, uint8_t* smem, const Rectangle& s, const Worker& w) {
        if (w.stages < 1) return;
        Place ring = {0, 0};
        Lane u;
        int sum[G*8];
        uint32_t a[2][2][4], scales;                                     // of both rows, fp16: floats would need registers all the time
        auto take = [&](int j, int slot) {                               // the stage's j-th unit into registers
            const uint8_t* at = unit(p, smem, s, w, slot, j);
            read_words(u, at, w.lane); read_table(u, at, w.lane, 0);
            scales = ((const uint32_t*)(at + INDEX_BYTES + TABLE_BYTES))[w.lane/4];
        };
        bar_wait(few_bars(smem, FULL), 0);
        take(0, 0);
#pragma unroll 1
        for (int left = w.stages; left > 0; left--) {
            const int slot = ring.at;
            ring.next(p.at.slots);
#pragma unroll
            for (int j = 0; j < N; j++) {
                const uint32_t low = shfl(matrix_low(smem + p.at.x + slot*p.at.x_bytes + w.mine*NT*2048), 0);   // as in FewTiles
                uint32_t scale;
#pragma unroll
                for (int pass = 0; pass < PASSES; pass++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        if (pass == 0) { entries(a[half][0], u, 2*half); entries(a[half][1], u, 2*half + 1); }
                        start(sum, a[half], low, pass, half);
                    }
                    if (pass == 0) {
                        scale = scales;
                        if (j + 1 < N) take(j + 1, slot);
                        else if (left > 1) { bar_wait(few_bars(smem, FULL) + ring.at, ring.turn); take(0, ring.at); }
                    }
                    wgmma_wait<0>();
#pragma unroll
                    for (int k = 0; k < G*8; k++) pin(sum[k]);
                    const float factor[2] = {half_to_float(scale & 0xffff), half_to_float(scale >> 16)};
                    add<G>(acc[j] + pass*G*4, sum, steps(p, smem, w, slot) + pass*G*8, factor);
                }
            }
            give(smem, EMPTY, w, slot);
        }
    }
#else
    // N tiles, from the first-th on, x one block of 128 columns
    template<int N> DEV void block(const Lane* u, int first, const uint8_t* x, const float* step, int lane) {
        int sum[N][NT*8];
#pragma unroll
        for (int i = 0; i < N*NT*8; i++) (&sum[0][0])[i] = 0;
        const int row = lane%8, near = row*128 + ((lane/8 ^ row) << 4);  // the lane's row of 16 bytes among four matrices of 8 rows x 16 columns
#pragma unroll
        for (int q = 0; q < 2; q++) {
            uint32_t b[2*NT][4];
#pragma unroll
            for (int n = 0; n < 2*NT; n++) load_matrices(b[n], x + n*1024 + (near ^ q*64));
#pragma unroll
            for (int j = 0; j < N; j++)
#pragma unroll
                for (int s = 0; s < 2; s++) {
                    uint32_t a[4]; entries(a, u[j], 2*q + s);
#pragma unroll
                    for (int n = 0; n < 2*NT; n++) mma_s8(sum[j] + 4*n, a, b[n][2*s], b[n][2*s + 1]);
                }
        }
#pragma unroll
        for (int j = 0; j < N; j++) add<NT>(acc[first + j], sum[j], step, u[j].scale);
    }
    template<int N> DEV void multiply(const FewArgs& p, uint8_t* smem, const Rectangle& s, const Worker& w) {
        Place ring = {0, 0};
#pragma unroll 1
        for (int i = 0; i < w.stages; i++, ring.next(p.at.slots)) {
            Lane u[N];
            bar_wait(few_bars(smem, FULL) + ring.at, ring.turn);
#pragma unroll
            for (int j = 0; j < N; j++) { const uint8_t* at = unit(p, smem, s, w, ring.at, j); read_words(u[j], at, w.lane); read_table(u[j], at, w.lane, 0); }
            constexpr int J = NT*N > 4 ? 1 : N;                          // as many as there are registers for
#pragma unroll
            for (int j = 0; j < N; j += J) block<J>(u + j, j, smem + p.at.x + ring.at*p.at.x_bytes + w.mine*NT*2048, steps(p, smem, w, ring.at), w.lane);
            give(smem, EMPTY, w, ring.at);
        }
    }
#endif
};
// What `few` reads then, NT*2080 bytes a block of 128 columns: first the planes of all blocks, then their scales. A thread has 16 columns of a token, eight
// of them a block. Numbers stay what they are, bf16 or fp16, up to here; what is beyond the range of fp16 keeps its size.
template<int BF16> DEV float low_of(uint32_t v) { return BF16 ? __uint_as_float(v << 16) : lo_half(v); }
template<int BF16> DEV float high_of(uint32_t v) { return BF16 ? __uint_as_float(v & 0xffff0000u) : hi_half(v); }
template<int BF16> DEV uint32_t pair_of(float low, float high) { return BF16 ? floats_to_bf16(low, high) : floats_to_f16(low, high); }   // to the nearest; infinity beyond the largest
struct PlanesArgs { uint8_t* y; int I, M, KB, NT; };
DEV int step_place(int NT, int token) { return NT == 1 ? token : token/16*16 + token%8/2*4 + token/8%2*2 + token%2; }   // a lane's four tokens side by side
template<int BF16> DEV void put_planes(const PlanesArgs& p, Piece q, int token, int i, bool there) {   // the token's i-th piece; all lanes come
    uint32_t most = 0;                                                   // absolute numbers by their bits, two at a time: a NaN is the largest
#pragma unroll
    for (int j = 0; j < 8; j++) most = most_of(most, q.v[j] & 0x7fff7fffu);
#pragma unroll
    for (int j = 1; j < 8; j *= 2) most = most_of(most, __float_as_uint(shfl_xor(__uint_as_float(most), j)));
    most = larger(most & 0xffffu, most >> 16);
    const float top = low_of<BF16>(most), inv = top > 0 ? full_ratio(32512.f, top) : 0.f;
    if (!there) return;
    if (most >= (BF16 ? 0x7f80u : 0x7c00u))                              // zeros times a scale that is none: all products are NaN
#pragma unroll
        for (int j = 0; j < 8; j++) q.v[j] = 0;
    const int b = i/8, piece = i%8;
    if (piece == 0) ((float*)(p.y + (size_t)p.KB*p.NT*2048))[b*p.NT*8 + step_place(p.NT, token)] = top*(1/32512.f);
    uint32_t low[4], high[4];
#pragma unroll
    for (int t = 0; t < 4; t++) {                                        // a lane's columns: the sum's low bits are the rounded number, and 128 more
        const float magic = 12582912.f + 128.f;
        const uint32_t a = __float_as_uint(fmaf(low_of<BF16>(q.v[t]), inv, magic)), b = __float_as_uint(fmaf(high_of<BF16>(q.v[t]), inv, magic));
        const uint32_t c = __float_as_uint(fmaf(low_of<BF16>(q.v[t + 4]), inv, magic)), d = __float_as_uint(fmaf(high_of<BF16>(q.v[t + 4]), inv, magic));
        const uint32_t ab = prmt(a, b, 0x5140u), cd = prmt(c, d, 0x5140u);
        low[t] = prmt(ab, cd, 0x5410u) ^ 0x80808080u; high[t] = prmt(ab, cd, 0x7632u);
    }
    uint4* at = (uint4*)(p.y + (size_t)b*p.NT*2048 + (token/8*16 + token%8)*128 + ((piece ^ token%8) << 4));
    at[0] = make_uint4(high[0], high[1], high[2], high[3]);
    at[64] = make_uint4(low[0], low[1], low[2], low[3]);
}
// of x, or with `up` of silu(x)·up, rounded to their type; rows are so many numbers apart
struct RowsArgs { const void *x, *up; int x_row, up_row; PlanesArgs to; };
template<int BF16, int GATED> __global__ void planes(const RowsArgs p) {
    grid_launch_next();
    const int pieces = p.to.KB*8, at = blockIdx.x*blockDim.x + threadIdx.x, last = p.to.M*pieces - 1, token = min(at, last)/pieces, i = min(at, last) - token*pieces;
    grid_wait();
    Piece q, up;
    q.load((const uint16_t*)p.x + (size_t)token*p.x_row, 16*i, p.to.I);
    if (GATED) {
        up.load((const uint16_t*)p.up + (size_t)token*p.up_row, 16*i, p.to.I);
        auto gate = [](float v) { return full_ratio(v, 1.f + fast_exp(-v)); };
#pragma unroll
        for (int j = 0; j < 8; j++) q.v[j] = pair_of<BF16>(gate(low_of<BF16>(q.v[j]))*low_of<BF16>(up.v[j]), gate(high_of<BF16>(q.v[j]))*high_of<BF16>(up.v[j]));
    }
    put_planes<BF16>(p.to, q, token, i, at <= last);
}
// x + y, rounded to their type, and planes of its norm, which is rounded to it, too. A block has a token, a thread N of its pieces. Weights come before the wait.
struct NormArgs { const void *x, *y, *weight; void* both; int x_row, y_row; float eps; PlanesArgs to; };
constexpr int NORM_THREADS = 512;   // of a block, at most
template<int BF16, int N> __global__ void __launch_bounds__(NORM_THREADS) norm_planes(const NormArgs p) {
    SHARED_BYTES(smem);
    grid_launch_next();
    const int token = blockIdx.x, lane = threadIdx.x%32, I = p.to.I;
    const uint16_t *x = (const uint16_t*)p.x + (size_t)token*p.x_row, *y = (const uint16_t*)p.y + (size_t)token*p.y_row;
    Piece w[N], q[N], other[N];
#pragma unroll
    for (int n = 0; n < N; n++) w[n].load(p.weight, 16*(threadIdx.x + n*blockDim.x), I);
    grid_wait();
#pragma unroll
    for (int n = 0; n < N; n++) {
        q[n].load(x, 16*(threadIdx.x + n*blockDim.x), I);
        if (p.y) other[n].load(y, 16*(threadIdx.x + n*blockDim.x), I);
    }
    float sum[2] = {0.f, 0.f};
#pragma unroll
    for (int n = 0; n < N; n++) {
        uint32_t* v = q[n].v;
        const int k = 16*(threadIdx.x + n*blockDim.x);
        if (p.y) {
            uint4* both = (uint4*)((uint16_t*)p.both + (size_t)token*I + k);
#pragma unroll
            for (int j = 0; j < 8; j++) v[j] = pair_of<BF16>(low_of<BF16>(v[j]) + low_of<BF16>(other[n].v[j]), high_of<BF16>(v[j]) + high_of<BF16>(other[n].v[j]));
            if (k < I) both[0] = make_uint4(v[0], v[1], v[2], v[3]);
            if (k + 8 < I) both[1] = make_uint4(v[4], v[5], v[6], v[7]);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) { sum[0] = fmaf(low_of<BF16>(v[j]), low_of<BF16>(v[j]), sum[0]); sum[1] = fmaf(high_of<BF16>(v[j]), high_of<BF16>(v[j]), sum[1]); }
    }
    float squares = sum[0] + sum[1];
#pragma unroll
    for (int d = 16; d; d /= 2) squares += shfl_xor(squares, d);
    if (lane == 0) ((float*)smem)[threadIdx.x/32] = squares;
    __syncthreads();
    constexpr int WARPS = NORM_THREADS/32;                               // at most
    squares = lane%WARPS < blockDim.x/32 ? ((const float*)smem)[lane%WARPS] : 0.f;
#pragma unroll
    for (int d = WARPS/2; d; d /= 2) squares += shfl_xor(squares, d);
    const float by = inverse_sqrt(full_ratio(squares, (float)I) + p.eps);
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int j = 0; j < 8; j++) q[n].v[j] = pair_of<BF16>(low_of<BF16>(q[n].v[j])*by*low_of<BF16>(w[n].v[j]), high_of<BF16>(q[n].v[j])*by*high_of<BF16>(w[n].v[j]));
        const int i = threadIdx.x + n*blockDim.x;
        put_planes<BF16>(p.to, q[n], token, i, i < p.to.KB*8);
    }
}
#endif

// ask for a stage, for a place in the ring; thread: of the copiers
DEV void ask_units(const FewArgs& p, uint8_t* smem, const Rectangle& s, int stage, int slot, int thread) {
    const int first = stage*p.deep, bytes = min(p.deep, s.nk - first)*UNIT;
    uint64_t* bar = few_bars(smem, FULL) + slot;
    uint8_t* at = smem + p.at.units + slot*p.at.slot_bytes;
    const uint8_t* from = p.units + ((size_t)s.tile*p.KB + s.k0 + first)*UNIT;
#if ARCH >= 90
    if (thread == 0) bar_expect(bar, s.tiles*bytes);
    warp_sync();
#pragma unroll 1
    for (int j = thread; j < s.tiles; j += 32) bulk_load(at + j*p.deep*UNIT, from + (size_t)j*p.KB*UNIT, bytes, bar);
#else
    for (int j = 0; j < s.tiles; j++)
        for (int i = 16*thread; i < bytes; i += 512*FEW_COPIERS) copy_piece(at + j*p.deep*UNIT + i, from + (size_t)j*p.KB*UNIT + i, true);
    arrive_copied(bar);
#endif
}
template<int NT> DEV void ask_tokens(const FewArgs& p, const Map* map, uint8_t* smem, const Rectangle& s, int stage, int slot, int thread) {
    const int first = stage*p.deep, boxes = 2*min(p.deep, s.nk - first), column = (s.k0 + first)*128;
    uint64_t* bar = few_bars(smem, FULL_X) + slot;
    uint8_t* at = smem + p.at.x + slot*p.at.x_bytes;
#if ARCH >= 90
    if (thread == 0) bar_expect(bar, p.flags & NO_TOKENS ? 0 : boxes*NT*1024);
    if (p.flags & NO_TOKENS) return;
    warp_sync();
#pragma unroll 1
    for (int i = thread; i < boxes; i += 32) box_load(at + i*NT*1024, map, column + 64*i, 0, bar);
#else
#pragma unroll 1
    for (int i = thread; i < boxes*NT*64 && !(p.flags & NO_TOKENS); i += 32*FEW_COPIERS) {   // 16 bytes each
        const int token = i/8%(8*NT), c = column + i/(NT*64)*64 + i%8*8;
        const bool inside = token < p.M && c < p.I;
        copy_piece(at + ((i - i%8) + (i%8 ^ token%8))*16, (const uint16_t*)p.x + (inside ? (size_t)token*p.I + c : 0), inside);
    }
    arrive_copied(bar);
#endif
}
template<int NT> DEV void ask_planes(const FewArgs& p, uint8_t* smem, const Rectangle& s, int stage, int slot, int thread) {
    const int first = stage*p.deep, blocks = p.flags & NO_TOKENS ? 0 : min(p.deep, s.nk - first);
    uint64_t* bar = few_bars(smem, FULL) + slot;                         // waits for the units as well
    const uint8_t* planes = (const uint8_t*)p.x + (size_t)(s.k0 + first)*NT*2048;
    const uint8_t* steps = (const uint8_t*)p.x + (size_t)p.KB*NT*2048 + (s.k0 + first)*NT*32;
    uint8_t *at = smem + p.at.x + slot*p.at.x_bytes, *steps_at = smem + p.at.steps + slot*p.at.step_bytes;
#if ARCH >= 90
    if (thread == 0) {
        bar_expect(bar, blocks*NT*2080);
        if (blocks) { bulk_load_again(at, planes, blocks*NT*2048, bar); bulk_load_again(steps_at, steps, blocks*NT*32, bar); }
    }
    warp_sync();                                                         // nobody may come so late that a barrier has turned twice
#else
    for (int i = 16*thread; i < blocks*NT*2048; i += 512*FEW_COPIERS) copy_piece(at + i, planes + i, true);
    for (int i = 16*thread; i < blocks*NT*32; i += 512*FEW_COPIERS) copy_piece(steps_at + i, steps + i, true);
    arrive_copied(bar);
#endif
}
// the copiers: weights before the activations are there; then a place as soon as all are done with it
template<int NT, int INT> DEV void copy_stages(const FewArgs& p, const Map* map, uint8_t* smem, const Rectangle& s, int thread) {
    const int stages = (s.nk + p.deep - 1)/p.deep;
    auto ask_x = [&](int stage, int slot) { if constexpr (INT) ask_planes<NT>(p, smem, s, stage, slot, thread); else ask_tokens<NT>(p, map, smem, s, stage, slot, thread); };
    if (ARCH >= 90 && !INT && thread == 0) fetch_map(map);
#pragma unroll 1
    for (int i = 0; i < min(stages, p.at.slots); i++) ask_units(p, smem, s, i, i, thread);
    if (!(p.flags & NO_WAIT)) grid_wait();                               // from here on we read what the kernel before us wrote
    STAMP(thread == 0, ALLOWED, now());
#pragma unroll 1
    for (int i = 0; i < min(stages, p.at.x_slots); i++) ask_x(i, i);
    Place units = {0, 0}, xs = {0, 0};
#pragma unroll 1
    for (int i = 0; i + min(p.at.slots, p.at.x_slots) < stages; i++) {
        if (i + p.at.slots < stages) { bar_wait(few_bars(smem, EMPTY) + units.at, units.turn); ask_units(p, smem, s, i + p.at.slots, units.at, thread); }
        if (INT) ask_x(i + p.at.slots, units.at);
        else if (i + p.at.x_slots < stages) { bar_wait(few_bars(smem, EMPTY_X) + xs.at, xs.turn); ask_x(i + p.at.x_slots, xs.at); }
        units.next(p.at.slots); xs.next(p.at.x_slots);
    }
}
DEV void write_8(const FewArgs& p, int token, int row, const float* v) {
    uint16_t* y = (uint16_t*)p.y + (size_t)token*p.O + row;
    uint32_t h[4];
#pragma unroll
    for (int i = 0; i < 4; i++) { const float a = v[2*i]*p.scale, b = v[2*i + 1]*p.scale; h[i] = p.bf16 ? floats_to_bf16(a, b) : floats_to_half2(a, b); }
    if (p.O%8 == 0) { if (row < p.O) *(uint4*)y = make_uint4(h[0], h[1], h[2], h[3]); return; }
#pragma unroll
    for (int i = 0; i < 8; i++) if (row + i < p.O) y[i] = h[i/2] >> i%2*16 & 0xffff;
}
DEV void add_8(float* v, const float* from, int count, int stride) {     // v: the sum of 8 floats each
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = 0.f;
    for (int c = 0; c < count; c++, from += stride)
#pragma unroll
        for (int i = 0; i < 2; i++) { const float4 f = ((const float4*)from)[i]; v[4*i] += f.x; v[4*i + 1] += f.y; v[4*i + 2] += f.z; v[4*i + 3] += f.w; }
}
// add the warps, and what the cluster's blocks have of the same rows; write
DEV void finish(const FewArgs& p, uint8_t* smem, const Rectangle& s, int ranks) {
    const float* sums = (const float*)(smem + p.at.x);
    float* parts = (float*)(smem + p.at.parts);
    const int pitch = 16*s.tiles + 4, pieces = 2*s.tiles, bits = p.rank_bits, share = 16*((s.tiles + ranks - 1) >> bits);
    uint64_t* bar = few_bars(smem, FULL) + 31;                           // counts what the others send
    float v[8];
    for (int i = threadIdx.x; i < p.M*pieces; i += blockDim.x) {
        const int token = i/pieces, o = i%pieces, j = o/2;               // j: of the block's tiles
        add_8(v, sums + token*pitch + 8*o, p.deep, p.M*pitch);
        if (ranks == 1) { write_8(p, token, s.tile*16 + 8*o, v); continue; }
        float* at = parts + (s.rank*p.M + token)*share + (j >> bits)*16 + o%2*8;
        const int to = j & (ranks - 1);
        send4(at, bar, to, v); send4(at + 4, bar, to, v + 4);
    }
    STAMP(threadIdx.x == 0, SENT, now());
    if (ranks == 1) return;
    bar_wait(bar, 0);
    for (int i = threadIdx.x; i < p.M*share/8; i += blockDim.x) {
        const int token = i/(share/8), o = i%(share/8), j = (o/2 << bits) + s.rank;
        if (j >= s.tiles) continue;
        add_8(v, parts + token*share + 8*o, ranks, p.M*share);
        write_8(p, token, (s.tile + j)*16 + o%2*8, v);
    }
}
// workers of a block, at most, and blocks that a processor has registers for: on Hopper this kernel's and the next one's
constexpr int few_warps(int NT, int TJ) { return ARCH == 90 ? (NT <= 2 && TJ == 1 ? 12 : 8) : NT*TJ > 8 ? 8 : 12; }
constexpr int few_blocks(int NT, int TJ) { return ARCH == 90 && NT*TJ <= 8 ? 2 : 1; }
template<int NT, int TJ, int INT> struct TilesOf { typedef FewTiles<NT, TJ> type; };
#if !E4M3
template<int NT, int TJ> struct TilesOf<NT, TJ, 1> { typedef PlaneTiles<NT, TJ> type; };
#endif
template<int NT, int TJ, int INT> __global__ void __launch_bounds__(32*(few_warps(NT, TJ) + FEW_COPIERS), few_blocks(NT, TJ)) few(const FewArgs p, MAP_PARAM x_map) {
    SHARED_1024(smem_1024);
    uint8_t* smem = smem_1024;
    const int lane = threadIdx.x%32, warp = threadIdx.x/32, workers = p.wide*p.deep, ranks = 1 << p.rank_bits, rank = cluster_rank();
    const int groups = gridDim.x/ranks, group = blockIdx.x/ranks;
    const int tile = part(p.tiles, group, groups), k0 = part(p.KB, rank, ranks);
    const Rectangle s = {tile, part(p.tiles, group + 1, groups) - tile, k0, part(p.KB, rank + 1, ranks) - k0, rank};
    const Rings& at = p.at;
    STAMP(threadIdx.x == 0, BEGUN, now());
    STAMP(threadIdx.x == 0, PROCESSOR, processor());
    if (warp == 0) {
        if (lane < at.slots) { bar_init(few_bars(smem, FULL) + lane, (1 + INT)*(ARCH >= 90 ? 1 : 32*FEW_COPIERS)); bar_init(few_bars(smem, EMPTY) + lane, workers); }
        if (lane < at.x_slots) { bar_init(few_bars(smem, FULL_X) + lane, ARCH >= 90 ? 1 : 32*FEW_COPIERS); bar_init(few_bars(smem, EMPTY_X) + lane, workers); }
#if ARCH >= 90
        if (lane == 0 && ranks > 1) { bar_init(few_bars(smem, FULL) + 31, 1); bar_expect(few_bars(smem, FULL) + 31, 64*ranks*p.M*((s.tiles - rank + ranks - 1)/ranks)); }
        if (ranks > 1) bars_made();
#endif
    }
    if (ranks > 1) cluster_arrive_first();
    __syncthreads();
    grid_launch_next();                                                  // the next kernel may queue its weights behind ours
    typename TilesOf<NT, TJ, INT>::type t; t.clear();
    const Worker w(p, s, TJ);
#ifdef STAMPS
    if (warp == 0) { bar_wait(few_bars(smem, FULL), 0); if (!INT) bar_wait(few_bars(smem, FULL_X), 0); STAMP(lane == 0, FIRST_THERE, now()); }
#endif
    if (warp >= workers) copy_stages<NT, INT>(p, &x_map, smem, s, threadIdx.x - 32*workers);
    else if (p.flags & NO_PRODUCTS || !w.count) t.wait_only(p, smem, w);
    else if (TJ == 2 && w.count == 2) t.template multiply<TJ>(p, smem, s, w);
    else t.template multiply<1>(p, smem, s, w);
    STAMP(threadIdx.x == 0, MULTIPLIED, now());                           // by the block's first warp
    if (ranks > 1) cluster_wait();                                       // the others have started
    __syncthreads();                                                     // the rings have been read: sums take their place
    float* sums = (float*)(smem + at.x);
    const int pitch = 16*s.tiles + 4;
    if (warp < workers) t.store(p, sums, pitch, w);
    __syncthreads();
    STAMP(threadIdx.x == 0, GATHERED, now());
    finish(p, smem, s, ranks);
    STAMP(threadIdx.x == 0, ENDED, now());
}
