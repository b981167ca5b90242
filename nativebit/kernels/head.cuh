// Logits of one token: a table of int8 rows with a scale each. A warp takes four rows at a time, a lane 16 numbers of each; the row they meet lies in shared memory.
constexpr int HEAD_THREADS = 256, HEAD_ROWS = 4;
struct HeadArgs { const uint8_t* table; const float* scales; const void* x; float* y; int V, D, bf16; };
static int head_bytes(int D) { return 4*D; }
// four int8 numbers times four floats: byte b ^ 128 under the exponent of 2^23 is the float 2^23 + 128 + b
DEV float dot4(uint32_t w, float4 x, float sum) {
    const uint32_t u = w ^ 0x80808080u;
    auto value = [u](int i) { return __uint_as_float(prmt(u, 0x4b000000u, 0x7440 + i)) - 8388736.f; };
    return fmaf(value(0), x.x, fmaf(value(1), x.y, fmaf(value(2), x.z, fmaf(value(3), x.w, sum))));
}
__global__ void __launch_bounds__(HEAD_THREADS) head(const HeadArgs p) {
    SHARED_BYTES(smem);
    float4* x = (float4*)smem;                                           // numbers 4j…4j+3 of piece i at j n + i: neighbours read neighbours
    const int n = p.D/16, lane = threadIdx.x%32, warp = blockIdx.x*(HEAD_THREADS/32) + threadIdx.x/32;
    grid_wait();
    for (int i = threadIdx.x; i < p.D/8; i += HEAD_THREADS) {
        Eight v; v.load(p.x, i*8, p.bf16);
        for (int j = 0; j < 2; j++) x[(i%2*2 + j)*n + i/2] = {v.v[4*j], v.v[4*j + 1], v.v[4*j + 2], v.v[4*j + 3]};
    }
    __syncthreads();
    for (int row = warp*HEAD_ROWS; row < p.V; row += gridDim.x*(HEAD_THREADS/32)*HEAD_ROWS) {
        const float scale = p.scales[min(row + lane%HEAD_ROWS, p.V - 1)];
        float sum[HEAD_ROWS] = {};
        const uint8_t* rows[HEAD_ROWS];
#pragma unroll
        for (int r = 0; r < HEAD_ROWS; r++) rows[r] = p.table + (size_t)min(row + r, p.V - 1)*p.D;
#pragma unroll 2
        for (int i = lane; i < n; i += 32) {
            uint4 w[HEAD_ROWS];
#pragma unroll
            for (int r = 0; r < HEAD_ROWS; r++) w[r] = load_once(rows[r] + 16*i);
            const float4 a = x[i], b = x[n + i], c = x[2*n + i], d = x[3*n + i];
#pragma unroll
            for (int r = 0; r < HEAD_ROWS; r++) sum[r] = dot4(w[r].x, a, dot4(w[r].y, b, dot4(w[r].z, c, dot4(w[r].w, d, sum[r]))));
        }
#pragma unroll
        for (int r = 0; r < HEAD_ROWS; r++) {
#pragma unroll
            for (int m = 16; m; m /= 2) sum[r] += shfl_xor(sum[r], m);
            if (lane == r && row + r < p.V) p.y[row + r] = sum[r]*scale;
        }
    }
}
