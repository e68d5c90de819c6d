// What a kernel is told: the loops over memory, the tensors, and what to do with them. No templates, no torch.
//
// A tensor is visited as  outer x r0 x k1 x r1  (outermost first): `outer` and `k1` number the cells, `r0` and
// `r1` are summed over. Where r1 > 1 the innermost loop is summed (row), otherwise it runs over cells (column).
// A cell is what one mean and one parameter belong to; `merge` neighbouring cells share their statistics (the
// channels of a group). With `along` the parameters run along the summed loops instead (layer norm).
#pragma once
#include <cstdint>

namespace renorm {

constexpr int kMaxOuter = 4;

enum DType { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
enum Activation { kIdentity = 0, kReLU = 1, kLeakyReLU = 2, kGELU = 3, kSiLU = 4 };
enum Operand { kX = 0, kY = 1, kMask = 2 };  // y, dy and dx lie alike

// The part that Python computes once for each pattern, shape and strides; the order is that of nest.py.
struct Nest {
    int64_t r0, k1, r1;
    int64_t merge;      // cells that share statistics
    int64_t params;     // entries of weight and bias; 0 without them
    int64_t param_div;  // parameter of a cell: (cell / param_div) % params
    int64_t along;      // 1: the parameters run along r1 (row) or r0 (column)
    int64_t outer_dims;
    int64_t outer_size[kMaxOuter];
    int64_t stride[3][2 + kMaxOuter];  // [operand][r0, k1, outer ...], in entries
    int64_t mask_inner;                // step of the mask along the innermost loop: 0 or 1
};

struct Job {
    Nest nest;
    int dtype;        // of x, y, dy, dx
    int param_dtype;  // of weight, bias and their gradients
    int threads;
    int about_zero;   // the mean is taken to be 0
    int activation;
    double slope;     // of leaky ReLU
    double eps;
    // Forward.
    const void* x;
    const void* residual;  // added to x before anything else, lies as y; the sum goes to `sum`
    void* sum;
    void* y;               // null: measure only
    const uint8_t* mask;
    const void* weight;
    const void* bias;
    double* stats;         // mean, biased variance, count, 1 / sqrt(var + eps): one row each over the sets
    int measured;          // the statistics are given, and `affine`
    const double* affine;  // scale, center, shift over the sets; null: standardize by the statistics
    // Backward.
    const void* dy;
    const void* dsum;       // gradient of `sum`, added to dx
    void* dx;               // null: sums only
    double* sums;           // gradients of scale, center and shift, one row each over the sets; null: not wanted
    const double* combine;  // dx = A dy + B (x - c) + D, c the mean as the accumulator holds it: rows B, D over the
                            // sets; null: by the statistics
    void* dweight;
    void* dbias;
    int fixed;  // the statistics do not depend on x
};

// Local response norm over channels that lie `channel_stride` apart; see local.h.
struct LocalJob {
    int dtype, threads;
    int64_t batch, channels, positions;  // logical sizes
    int64_t batch_stride, channel_stride, position_stride;
    int64_t before, after;  // channels of the window on either side
    double alpha;           // already divided by the window's size where the convention says so
    double beta, k;
    const void* x;
    const void* dy;
    void* out;  // y, or dx where dy is given
};

enum RecurrentCell { kLSTM = 0, kGRU = 1 };

// Layer norm in recurrence, a layer in one direction; see recurrent.h. Gates lie as in torch: i, f, g, o; r, z, n.
// "packed" are the rows of all steps, without gaps.
struct RecurrentJob {
    int dtype, threads;  // dtype: float32 or float64
    int cell;
    int64_t steps, rows;     // rows: the most that a step has
    int64_t hidden, state;   // entries of c, and of h, which differ where h is projected
    const int64_t* table;    // of each step, in the order in which forward takes them: struct RecurrentStep
    double eps;
    const void* x;            // the input, multiplied and normalized, biases added: (packed, gates); GRU: r and z
    const void* candidate_x;  // GRU: (packed, hidden)
    const void* weight;       // (gates, state)
    const void* norm_weight;  // (gates)
    const void* norm_bias;    // GRU: of the candidate, (hidden)
    const void* cell_weight;  // LSTM: (hidden)
    const void* cell_bias;
    const void* projection;   // (state, hidden) or null
    void* states;             // h of all steps, and the initial ones
    void* cells;              // LSTM: c, likewise
    void* pre;                // (packed, gates): weight times h; null: backward will not ask
    void* norms;              // (packed, 6)
    void* raw;                // (packed, hidden): h before the projection
    // Backward.
    const void* dy;  // (packed, state); null: forward
    void* dh;        // (rows, state): of the last states, then of the initial ones
    void* dc;        // LSTM: (rows, hidden)
    void* dx;
    void* dcandidate_x;
    void* dpre;     // (packed, gates)
    void* dstates;  // (packed, state): where h is projected
    double* sums;   // (threads, 6 hidden): of norm_weight, cell_weight, cell_bias; GRU (threads, 4 hidden): norm_weight,
                    // norm_bias
};

// One for each instruction set. All return false where memory is short.
struct Kernels {
    const char* name;
    bool (*forward)(const Job&);
    bool (*backward)(const Job&);
    bool (*local)(const LocalJob&);
    bool (*recurrent)(const RecurrentJob&);
};

extern const Kernels kernels_baseline;
#ifdef RENORM_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace renorm
