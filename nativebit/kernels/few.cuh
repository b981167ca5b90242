// Two to 64 tokens, as fp16 on tensor cores. A thread block has a rectangle of units: some row tiles x some blocks of 128 columns. It goes along
// the columns in stages of DEEP blocks; two rings in shared memory hold the next stages, one of units and one of activations. A warp keeps the sums
// of TJ tiles and all tokens to the end, and takes one block of each stage; one reduction adds the DEEP warps of a tile, and a cluster's blocks.
//
// Activations are copied as they are, a box of 64 columns x all tokens at a time: in the order of its swizzle, `ldmatrix` makes of token rows what the
// product reads as its second operand. So fp16 is neither converted nor rearranged; bf16 becomes fp16 in place, a stage at a time.
enum FewFlags { NO_TOKENS = 4 };   // beside NO_PRODUCTS and NO_WAIT: activations are not read

// Shared memory of a block, at least 1024 bytes of barriers in front; weights go first: they may be asked for before the activations are there
struct Rings {
    int stages, x, x_slots, x_bytes, units, slots, slot_bytes, parts, bytes;
    Rings(int tiles, int blocks, int M, int NT, int deep, int ranks, int room, int ahead, int share) {   // ahead: bytes of activations that should be on their way
        stages = (blocks + deep - 1)/deep; x_bytes = deep*NT*2048; slot_bytes = (tiles*deep*UNIT + 127)/128*128;
        const int least = min(stages, 2), least_x = min(stages, share > 1 ? 3 : 2), most = min(stages, 32), sums = 4*deep*M*(16*tiles + 4);
        const int sent = ranks > 1 ? 4*ranks*M*16*((tiles + ranks - 1)/ranks) : 0;   // (rank, token, row) of the tiles that this block writes
        room -= 2048 + sent;
        const int wanted = min(most, max(least_x, min((ahead + x_bytes - 1)/x_bytes, (room - least*slot_bytes)/x_bytes)));
        slots = min(most, (room - wanted*x_bytes)/slot_bytes);
        x_slots = slots < least ? 0 : min(most, (room - slots*slot_bytes)/x_bytes);
        x = 1024; units = x + x_slots*x_bytes;
        parts = (max(units + slots*slot_bytes, x + sums) + 127)/128*128; bytes = parts + sent + 1024;   // sums lie where the rings were
    }
};
struct FewArgs { const uint8_t* units; const void* x; void* y; int O, I, M, KB, tiles, wide, deep, rank_bits, share, copied; float scale; int bf16, flags; Rings at; };
constexpr int few_warps(int NT, int TJ) { return NT*TJ > 8 ? 8 : 16; }   // of a block, at most: there are registers for so many
struct Rectangle { int tile, tiles, k0, nk, rank, sharer; };   // of the row tiles and column blocks; which part of the input, and which of the blocks that read it together

template<int NT, int TJ> struct FewTiles {   // NT: groups of 8 tokens
    static constexpr bool AFTER = !E4M3 && NT <= 2;   // scales multiply a block's sums, or else its weights: fewer instructions, or fewer registers
    float acc[TJ][NT][4];
    DEV void clear() {
#pragma unroll
        for (int i = 0; i < TJ*NT*4; i++) (&acc[0][0][0])[i] = 0.f;
    }
    DEV static void weights(uint32_t* a, const Lane& u, int s, const uint32_t* scale) {
        weights_f16(a, u, s);
        if (E4M3) return;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            a[i] = half_sub(a[i], 0x64806480u);
            if (!AFTER) a[i] = half_mul(a[i], scale[i%2]);
        }
    }
    struct Units {                                                       // of the TJ tiles, or the `have` there are; `stride` bytes from one to the next
        Lane u[TJ];
        uint32_t scale[TJ][2];
        DEV void read(const uint8_t* units, int stride, int have, int lane) {
#pragma unroll
            for (int j = 0; j < TJ; j++) {
                const uint8_t* at = units + (j < have ? j : 0)*stride;
                read_words(u[j], at, lane); read_table(u[j], at, lane, 0x80808080u);
                const uint32_t s = AFTER || E4M3 ? 0 : ((const uint32_t*)(at + INDEX_BYTES + TABLE_BYTES))[lane/4];
                scale[j][0] = prmt(s, 0, 0x1010u); scale[j][1] = prmt(s, 0, 0x3232u);
            }
        }
    };
    // N tiles x one block of 128 columns
    template<int N> DEV void multiply(const Units& u, const uint8_t* x, int lane) {
        float sum[N][NT][4];
#pragma unroll
        for (int i = 0; i < N*NT*4; i++) (&sum[0][0][0])[i] = 0.f;
        const int row = lane%8, near = row*128 + ((lane/8 ^ row) << 4);   // the lane's row of 16 bytes among four matrices of 8 x 8
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
                    for (int n = 0; n < NT; n++) mma_f16(AFTER ? sum[j][n] : acc[j][n], a, b[n][2*s], b[n][2*s + 1]);
                }
        }
        if (!AFTER) return;
#pragma unroll
        for (int i = 0; i < N*NT*4; i++) acc[i/4/NT][i/4%NT][i%4] = fmaf(sum[i/4/NT][i/4%NT][i%4], u.u[i/4/NT].scale[i%4/2], acc[i/4/NT][i/4%NT][i%4]);
    }
    DEV void store(float* sums, int tile, int have, int pitch, int M, int lane) {   // sums: (M, pitch)
#pragma unroll
        for (int i = 0; i < TJ*NT*4; i++) {
            const int token = i/4%NT*8 + lane%4*2 + i%2, row = (tile + i/4/NT)*16 + lane/4 + i%4/2*8;
            if (token < M && i/4/NT < have) sums[token*pitch + row] = acc[i/4/NT][i/4%NT][i%4];
        }
    }
};

// ask for a stage, for a place in the ring; of weights: by one warp, or below 90 by all threads
DEV void ask_units(const FewArgs& p, uint8_t* smem, const Rectangle& s, int stage, int slot) {
    const int first = stage*p.deep, bytes = min(p.deep, s.nk - first)*UNIT, lane = threadIdx.x%32;
    uint64_t* bar = (uint64_t*)smem + slot;
    uint8_t* at = smem + p.at.units + slot*p.at.slot_bytes;
    const uint8_t* from = p.units + ((size_t)s.tile*p.KB + s.k0 + first)*UNIT;
#if ARCH >= 90
    if (lane == 0) bar_expect(bar, s.tiles*bytes);
    warp_sync();
#pragma unroll 1
    for (int j = lane; j < s.tiles; j += 32) bulk_load(at + j*p.deep*UNIT, from + (size_t)j*p.KB*UNIT, bytes, bar);
#else
    for (int j = 0; j < s.tiles; j++) copy_run(at + j*p.deep*UNIT, from + (size_t)j*p.KB*UNIT, bytes);
    arrive_copied(bar);
#endif
}
// by tensor copies of one warp, each of the blocks that share them asking for some; or by all threads
template<int NT> DEV void ask_tokens(const FewArgs& p, const Map* map, uint8_t* smem, const Rectangle& s, int stage, int slot) {
    const int first = stage*p.deep, boxes = 2*min(p.deep, s.nk - first), column = (s.k0 + first)*128;
    uint64_t* bar = (uint64_t*)smem + 32 + slot;
    uint8_t* at = smem + p.at.x + slot*p.at.x_bytes;
    if (ARCH >= 90 && !p.copied) {
        if (threadIdx.x == 0) bar_expect(bar, boxes*NT*1024);
        warp_sync();
#pragma unroll 1
        for (int i = threadIdx.x*p.share + s.sharer; i < boxes; i += 32*p.share) {
            if (p.share == 1) box_load(at + i*NT*1024, map, column + 64*i, 0, bar);
            else box_load_all(at + i*NT*1024, map, column + 64*i, 0, bar, ((1 << p.share) - 1) << s.rank*p.share);
        }
        return;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < boxes*NT*64; i += blockDim.x) {        // 16 bytes each
        const int token = i/8%(8*NT), c = column + i/(NT*64)*64 + i%8*8;
        if (token < p.M) copy_piece(at + ((i - i%8) + (i%8 ^ token%8))*16, (const uint16_t*)p.x + (size_t)token*p.I + (c < p.I ? c : 0), c < p.I);
    }
    arrive_copied(bar);
}
template<int NT> DEV void halve_stage(uint8_t* at, int boxes, int M) {
    for (int i = threadIdx.x; i < boxes*NT*64; i += blockDim.x) {
        if (i/8%(8*NT) >= M) continue;
        const uint4 v = ((const uint4*)at)[i];
        ((uint4*)at)[i] = make_uint4(bf16_as_half(v.x), bf16_as_half(v.y), bf16_as_half(v.z), bf16_as_half(v.w));
    }
    async_fence();                                                       // before the next copy into it
    __syncthreads();
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
DEV void finish(const FewArgs& p, const float* sums, float* parts, const Rectangle& s, int ranks) {
    const int pitch = 16*s.tiles + 4, pieces = 2*s.tiles, bits = p.rank_bits, share = 16*((s.tiles + ranks - 1) >> bits);
    float v[8];
    if (ranks > 1 && p.share == 1) cluster_wait();                       // the others have started
    for (int i = threadIdx.x; i < p.M*pieces; i += blockDim.x) {
        const int token = i/pieces, o = i%pieces, j = o/2;               // j: of the block's tiles
        add_8(v, sums + token*pitch + 8*o, p.deep, p.M*pitch);
        if (ranks == 1) { write_8(p, token, s.tile*16 + 8*o, v); continue; }
        float* at = parts + (s.rank*p.M + token)*share + (j >> bits)*16 + o%2*8;
        const int to = (j & (ranks - 1))*p.share + s.sharer;
        store4_in_rank(at, to, v); store4_in_rank(at + 4, to, v + 4);
    }
    if (ranks == 1) return;
    cluster_arrive(); cluster_wait();
    for (int i = threadIdx.x; i < p.M*share/8; i += blockDim.x) {
        const int token = i/(share/8), o = i%(share/8), j = (o/2 << bits) + s.rank;
        if (j >= s.tiles) continue;
        add_8(v, parts + token*share + 8*o, ranks, p.M*share);
        write_8(p, token, (s.tile + j)*16 + o%2*8, v);
    }
}

template<int NT, int TJ> __global__ void __launch_bounds__(32*few_warps(NT, TJ), 1) few(const FewArgs p, MAP_PARAM x_map) {
    SHARED_BYTES(raw);
    uint8_t* smem = align_1024(raw);
    const int lane = threadIdx.x%32, warp = threadIdx.x/32, ranks = 1 << p.rank_bits, rank = cluster_rank()/p.share, sharer = cluster_rank()%p.share;
    const int groups = gridDim.x/ranks, group = blockIdx.x/cluster_size()*p.share + sharer;   // a cluster: ranks x share blocks
    const int tile = part(p.tiles, group, groups), k0 = part(p.KB, rank, ranks);
    const Rectangle s = {tile, part(p.tiles, group + 1, groups) - tile, k0, part(p.KB, rank + 1, ranks) - k0, rank, sharer};
    const int stages = (s.nk + p.deep - 1)/p.deep, mine = warp/p.wide, first = (warp + mine)%p.wide*TJ, have = min(s.tiles - first, TJ);   // in turn, so that those who have less are not all one scheduler's
    const bool works = have > 0 && !(p.flags & NO_PRODUCTS), reads = !(p.flags & NO_TOKENS), asks = ARCH < 90 || warp == 0, asks_x = reads && (p.copied || warp == 0);
    const Rings& at = p.at;
    uint64_t* bar = (uint64_t*)smem;                                     // 32 for weights, for activations, and for places that all blocks are done with
    if (warp == 0) {
        if (lane < at.slots) bar_init(bar + lane, ARCH >= 90 ? 1 : blockDim.x);
        if (lane < at.x_slots) bar_init(bar + 32 + lane, p.copied ? blockDim.x : 1);
        if (lane < at.x_slots) bar_init(bar + 64 + lane, p.share);
        if (ARCH >= 90 && lane == 0 && !p.copied) fetch_map(&x_map);
        warp_sync();
    }
    if (ranks*p.share > 1) cluster_arrive();
    if (ARCH < 90 || p.copied) __syncthreads();
    if (asks)
#pragma unroll 1
        for (int i = 0; i < min(stages, at.slots); i++) ask_units(p, smem, s, i, i);
    grid_launch_next();                                                  // the next kernel may queue its weights behind ours
    if (!(p.flags & NO_WAIT)) grid_wait();                               // from here on we read what the kernel before us wrote
    if (p.share > 1) cluster_wait();                                     // the others' barriers are there
    if (asks_x)
#pragma unroll 1
        for (int i = 0; i < min(stages, at.x_slots); i++) ask_tokens<NT>(p, &x_map, smem, s, i, i);
    __syncthreads();
    FewTiles<NT, TJ> t; t.clear();
    const int lag = p.share > 1, first_refill = min(at.slots, at.x_slots);   // blocks that share wait for each other: a stage later, it costs no time
    int slot = 0, turn = 0, x_slot = 0, x_turn = 0;                      // places in the rings, and how often they were filled before
    for (int i = 0; i < stages; i++) {
        uint8_t *x = smem + at.x + x_slot*at.x_bytes, *units = smem + at.units + slot*at.slot_bytes;
        const int blocks = min(p.deep, s.nk - i*p.deep);
        typename FewTiles<NT, TJ>::Units u;
        bar_wait(bar + slot, turn & 1);
        if (works && mine < blocks) u.read(units + (first*p.deep + mine)*UNIT, p.deep*UNIT, have, lane);
        if (reads) {
            bar_wait(bar + 32 + x_slot, x_turn & 1);
            if (p.bf16) halve_stage<NT>(x, 2*blocks, p.M);
        }
        if (works && mine < blocks) {
            if (have == TJ) t.template multiply<TJ>(u, x + mine*NT*2048, lane); else t.template multiply<1>(u, x + mine*NT*2048, lane);
        }
        if (i + first_refill - lag < stages) {
            __syncthreads();                                             // all are done with this stage: its place may be filled
            if (asks && i + at.slots < stages) ask_units(p, smem, s, i + at.slots, slot);
            if (lag && warp == 0 && lane < p.share && i + at.x_slots < stages) bar_arrive_in_rank(bar + 64 + x_slot, rank*p.share + lane);
            const int next = i + at.x_slots - lag, at_slot = lag ? (x_slot ? x_slot : at.x_slots) - 1 : x_slot;
            if (asks_x && i >= lag && next < stages) {
                if (lag) bar_wait(bar + 64 + at_slot, (x_slot ? x_turn : x_turn - 1) & 1);
                ask_tokens<NT>(p, &x_map, smem, s, next, at_slot);
            }
        }
        if (++slot == at.slots) { slot = 0; turn++; }
        if (++x_slot == at.x_slots) { x_slot = 0; x_turn++; }
    }
    if (lag && ranks == 1) cluster_arrive();
    __syncthreads();                                                     // the rings have been read: sums take their place
    float* sums = (float*)(smem + at.x);
    t.store(sums + mine*p.M*(16*s.tiles + 4), first, have, 16*s.tiles + 4, p.M, lane);
    __syncthreads();
    finish(p, sums, (float*)(smem + at.parts), s, ranks);
    if (lag && ranks == 1) cluster_wait();                               // nobody leaves before the others have all that it sent
}
