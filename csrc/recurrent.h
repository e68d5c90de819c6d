// Layer norm in recurrence: a whole sequence through one layer in one direction, a product and a fused loop a step.
//
// The weights are packed once into panels, a few vectors of columns wide, that a step reads in order. Where they are
// small, each thread walks its own sequences from the first step to the last and waits for nobody. Otherwise each
// thread owns some of the columns, whose weights stay in its cache, and all meet twice a step.

#if defined(__AVX512F__)
constexpr int kTileRows = 8;  // with kTileVectors the accumulators of one tile: half of the registers
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVectors = 2;
// Seen on two cores with AVX-512: what is near takes as long either way alone, and less on a busy machine by rows.
constexpr int64_t kWeightsNear = 4 << 20;         // bytes of weights that each core may read at every step
constexpr int64_t kProductsPerThread = 1 << 19;   // multiplications of a sequence below which a thread costs more
constexpr int64_t kProductsPerMeeting = 1 << 16;  // and those of a step, where the threads meet
constexpr int64_t kRowsPerThread = 4;             // below this a thread reads weights for too little work

template <class A>
constexpr int64_t kPanel = kTileVectors * kLanes<A>;  // columns

inline void meet() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

// Like `parallel`, by a team of no more threads, which may meet: a sequence is long enough to start them for it.
template <class F>
inline void together(int threads, F f) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        f(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    f(0, 1);
}

// f(i, whole or part) over n entries: for loops too long to be unrolled, as `each` does.
template <class A, class F>
RENORM_ALWAYS inline void vectors(int64_t n, F f) {
    int64_t i = 0;
    for (; i + kLanes<A> <= n; i += kLanes<A>) f(i, Whole{});
    if (i < n) f(i, Part{n - i});
}

template <class A, class W>
RENORM_ALWAYS inline Vec<A> entries(W whole_or_part, const A* p) {
    return get<A>(whole_or_part, p, A(0));
}

template <class A>
inline Vec<A> sigmoid(Vec<A> z) {
    Vec<A> one = splat(A(1));
    return one / (one + exponential<A>(splat(A(0)) - z));
}
template <class A>
inline Vec<A> hyperbolic_tangent(Vec<A> z) {
    A lanes[kLanes<A>];
    std::memcpy(lanes, &z, sizeof z);
    for (int i = 0; i < kLanes<A>; i++) lanes[i] = A(tanh(double(lanes[i])));
    std::memcpy(&z, lanes, sizeof z);
    return z;
}
#if defined(__GNUC__) && !defined(RENORM_PLAIN_LANES)
// z + z^3 P(z^2) up to 0.65, within 8e-9 of itself (fitted for this file); 1 - 2 / (exp(2z) + 1) beyond.
template <>
inline Vec<float> hyperbolic_tangent<float>(Vec<float> z) {
    typedef Vec<float> V;
    V size = z < 0.0f ? -z : z, u = z * z;
    V near = z + z * u * ((((u * -0.00551516324f + 0.0204694192f) * u - 0.0536880229f) * u + 0.133308303f) * u -
                          0.333332598f);
    V rest = 1.0f - 2.0f / (exponential<float>(size + size) + 1.0f);
    rest = z < 0.0f ? -rest : rest;
    V result = size < 0.65f ? near : rest;
    return z != z ? z : result;
}
#endif

// ---- products with packed weights

template <class A>
struct Packed {
    int64_t inner, columns, panels;
    Scratch<A> data;
    Packed(int64_t inner, int64_t columns)
        : inner(inner), columns(columns), panels((columns + kPanel<A> - 1) / kPanel<A>),
          data(inner * panels * kPanel<A>) {}

    // Column j of the packed matrix is row j of `weight`, (columns, inner); or column j of it, (inner, columns).
    void fill(const A* weight, bool rows, int64_t first, int64_t last) {
        for (int64_t panel = first; panel < last; panel++) {
            A* to = data + panel * inner * kPanel<A>;
            int64_t j0 = panel * kPanel<A>, width = least(kPanel<A>, columns - j0);
            if (rows) {
                for (int64_t j = 0; j < width; j++)
                    for (int64_t k = 0; k < inner; k++) to[k * kPanel<A> + j] = weight[(j0 + j) * inner + k];
            } else {
                for (int64_t k = 0; k < inner; k++)
                    std::memcpy(to + k * kPanel<A>, weight + k * columns + j0, size_t(width) * sizeof(A));
            }
        }
    }
};

template <class A, int M>
inline void tile(const A* a, int64_t inner, const A* b, A* c, int64_t ldc, int64_t width, bool add) {
    Vec<A> sums[M][kTileVectors];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < kTileVectors; v++) sums[m][v] = splat(A(0));
    for (int64_t k = 0; k < inner; k++) {
        Vec<A> weights[kTileVectors];
        for (int v = 0; v < kTileVectors; v++) weights[v] = load<A>(b + k * kPanel<A> + v * kLanes<A>);
        for (int m = 0; m < M; m++) {
            Vec<A> entry = splat(a[m * inner + k]);
            for (int v = 0; v < kTileVectors; v++) sums[m][v] += entry * weights[v];
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < kTileVectors; v++) {
            A* to = c + m * ldc + v * kLanes<A>;
            int64_t left = width - v * kLanes<A>;
            if (left >= kLanes<A>) {
                put<A>(Whole{}, to, add ? entries(Whole{}, to) + sums[m][v] : sums[m][v]);
            } else if (left > 0) {
                put<A>(Part{left}, to, add ? entries(Part{left}, to) + sums[m][v] : sums[m][v]);
            }
        }
}

// c = a b, or c += a b, for some rows of a and some panels of b.
template <class A>
inline void product(const A* a, const Packed<A>& b, A* c, int64_t rows, int64_t first, int64_t last, bool add = false) {
    for (int64_t panel = first; panel < last; panel++) {
        const A* weights = b.data + panel * b.inner * kPanel<A>;
        int64_t j = panel * kPanel<A>, width = least(kPanel<A>, b.columns - j);
        for (int64_t m = 0; m < rows;) {
            const A* from = a + m * b.inner;
            A* to = c + m * b.columns + j;
            if (rows - m >= kTileRows) {
                tile<A, kTileRows>(from, b.inner, weights, to, b.columns, width, add);
                m += kTileRows;
            } else if (rows - m >= 4) {
                tile<A, 4>(from, b.inner, weights, to, b.columns, width, add);
                m += 4;
            } else if (rows - m >= 2) {
                tile<A, 2>(from, b.inner, weights, to, b.columns, width, add);
                m += 2;
            } else {
                tile<A, 1>(from, b.inner, weights, to, b.columns, width, add);
                m += 1;
            }
        }
    }
}

// ---- layer norm of a row

// x_hat = (x - mean - rest) rstd: what rounding the mean loses is in the rest.
template <class A>
struct Standardized {
    A mean, rest, rstd;
    Vec<A> operator()(Vec<A> x) const { return (x - splat(mean) - splat(rest)) * splat(rstd); }
};

template <class A>
inline Standardized<A> standardize(const A* x, int64_t n, double eps) {
    A mean = row_total<true, A, A>(x, n, nullptr) / A(n), s, q;
    row_moments<true, A, A>(x, n, nullptr, mean, s, q);
    double rest = double(s) / double(n), var = double(q) / double(n) - rest * rest;
    return {mean, A(rest), A(1 / sqrt((var < 0 ? 0 : var) + eps))};
}

// From the gradient d of weight x_hat (+ bias) that of x; the weight's is added to `sums`.
template <class A>
inline void norm_gradient(const A* x, const Standardized<A>& norm, const A* weight, const A* d, int64_t n, A* dx,
                          A* sums) {
    Four<A> s, t;
    each<A>(n, [&](int64_t j, int u, auto w) RENORM_INLINE {
        Vec<A> g = entries(w, d + j), along = g * norm(entries(w, x + j)), weights = entries(w, weight + j);
        put<A>(w, sums + j, entries(w, sums + j) + along);
        s.v[u] += g * weights;
        t.v[u] += along * weights;
    });
    Vec<A> mean = splat(s.sum() / A(n)), slope = splat(t.sum() / A(n));
    each<A>(n, [&](int64_t j, int, auto w) RENORM_INLINE {
        Vec<A> g = entries(w, d + j) * entries(w, weight + j);
        put<A>(w, dx + j, splat(norm.rstd) * (g - mean - norm(entries(w, x + j)) * slope));
    });
}

// ---- cells: one row of one step

template <class A>
struct LSTM {
    const A *norm_weight, *cell_weight, *cell_bias;
    int64_t hidden;
    double eps;

    explicit LSTM(const RecurrentJob& job)
        : norm_weight((const A*)job.norm_weight), cell_weight((const A*)job.cell_weight),
          cell_bias((const A*)job.cell_bias), hidden(job.hidden), eps(job.eps) {}

    template <class W>
    Vec<A> gate(int64_t which, const A* pre, const Standardized<A>& norm, const A* x, int64_t j, W w) const {
        j += which * hidden;
        return norm(entries(w, pre + j)) * entries(w, norm_weight + j) + entries(w, x + j);
    }

    // pre: W_hh h; x: the input's part; c, h: cell and what goes out, before a projection; open: scratch.
    void forward(const A* pre, const A* x, const A* c_before, A* c, A* h, Standardized<A>* norms, A* open) const {
        Standardized<A> norm = norms[0] = standardize(pre, 4 * hidden, eps);
        vectors<A>(hidden, [&](int64_t j, auto w) RENORM_INLINE {
            Vec<A> i = sigmoid<A>(gate(0, pre, norm, x, j, w)), f = sigmoid<A>(gate(1, pre, norm, x, j, w));
            Vec<A> g = hyperbolic_tangent<A>(gate(2, pre, norm, x, j, w));
            put<A>(w, c + j, f * entries(w, c_before + j) + i * g);
            put<A>(w, open + j, sigmoid<A>(gate(3, pre, norm, x, j, w)));
        });
        norm = norms[1] = standardize(c, hidden, eps);
        vectors<A>(hidden, [&](int64_t j, auto w) RENORM_INLINE {
            Vec<A> z = norm(entries(w, c + j)) * entries(w, cell_weight + j) + entries(w, cell_bias + j);
            put<A>(w, h + j, entries(w, open + j) * hyperbolic_tangent<A>(z));
        });
    }

    // dc: of this step's cell by later steps, then of the cell before; dx, dpre: of x and pre.
    // sums: of norm_weight, cell_weight and cell_bias; inner: scratch.
    void backward(const A* pre, const A* x, const A* c_before, const A* c, const A* dh, const A* dh_more,
                  const Standardized<A>* norms, A* dc, A* dx, A* dpre, A* sums, A* inner) const {
        Standardized<A> norm = norms[0], cell = norms[1];
        A *weight_sums = sums + 4 * hidden, *bias_sums = sums + 5 * hidden;
        Vec<A> one = splat(A(1)), s = splat(A(0)), t = s;
        vectors<A>(hidden, [&](int64_t j, auto w) RENORM_INLINE {
            Vec<A> d = entries(w, dh + j), o = sigmoid<A>(gate(3, pre, norm, x, j, w));
            if (dh_more) d += entries(w, dh_more + j);
            Vec<A> c_hat = cell(entries(w, c + j)), weight = entries(w, cell_weight + j);
            Vec<A> u = hyperbolic_tangent<A>(c_hat * weight + entries(w, cell_bias + j));
            put<A>(w, dx + 3 * hidden + j, d * u * o * (one - o));
            Vec<A> du = d * o * (one - u * u), along = du * c_hat;
            put<A>(w, weight_sums + j, entries(w, weight_sums + j) + along);
            put<A>(w, bias_sums + j, entries(w, bias_sums + j) + du);
            put<A>(w, inner + j, du * weight);
            s += du * weight;
            t += along * weight;
        });
        Vec<A> mean = splat(total<A>(s) / A(hidden)), slope = splat(total<A>(t) / A(hidden));
        vectors<A>(hidden, [&](int64_t j, auto w) RENORM_INLINE {
            Vec<A> by_h = entries(w, inner + j) - mean - cell(entries(w, c + j)) * slope;
            Vec<A> d = entries(w, dc + j) + splat(cell.rstd) * by_h;
            Vec<A> i = sigmoid<A>(gate(0, pre, norm, x, j, w)), f = sigmoid<A>(gate(1, pre, norm, x, j, w));
            Vec<A> g = hyperbolic_tangent<A>(gate(2, pre, norm, x, j, w));
            put<A>(w, dx + j, d * g * i * (one - i));
            put<A>(w, dx + hidden + j, d * entries(w, c_before + j) * f * (one - f));
            put<A>(w, dx + 2 * hidden + j, d * i * (one - g * g));
            put<A>(w, dc + j, d * f);
        });
        norm_gradient(pre, norm, norm_weight, dx, 4 * hidden, dpre, sums);
    }
};

template <class A>
struct GRU {
    const A *norm_weight, *norm_bias;
    int64_t hidden;
    double eps;

    explicit GRU(const RecurrentJob& job)
        : norm_weight((const A*)job.norm_weight), norm_bias((const A*)job.norm_bias), hidden(job.hidden),
          eps(job.eps) {}

    template <class W>
    Vec<A> gate(int64_t which, const A* pre, const Standardized<A>& norm, const A* x, int64_t j, W w) const {
        j += which * hidden;
        return norm(entries(w, pre + j)) * entries(w, norm_weight + j) + entries(w, x + j);
    }
    // What the reset gate lets into the candidate.
    template <class W>
    Vec<A> recurrent(const A* pre, const Standardized<A>& norm, int64_t j, W w) const {
        Vec<A> q_hat = norm(entries(w, pre + 2 * hidden + j));
        return q_hat * entries(w, norm_weight + 2 * hidden + j) + entries(w, norm_bias + j);
    }

    void forward(const A* pre, const A* x, const A* candidate_x, const A* h_before, A* h,
                 Standardized<A>* norms) const {
        Standardized<A> norm = norms[0] = standardize(pre, 2 * hidden, eps);
        Standardized<A> inner = norms[1] = standardize(pre + 2 * hidden, hidden, eps);
        vectors<A>(hidden, [&](int64_t j, auto w) RENORM_INLINE {
            Vec<A> r = sigmoid<A>(gate(0, pre, norm, x, j, w)), z = sigmoid<A>(gate(1, pre, norm, x, j, w));
            Vec<A> n = hyperbolic_tangent<A>(entries(w, candidate_x + j) + r * recurrent(pre, inner, j, w));
            put<A>(w, h + j, n + z * (entries(w, h_before + j) - n));
        });
    }

    // dh: of this step's h by later steps, then of the h before by the gate z alone; inner: scratch.
    void backward(const A* pre, const A* x, const A* candidate_x, const A* h_before, const A* dy, A* dh,
                  const Standardized<A>* norms, A* dx, A* dcandidate_x, A* dpre, A* sums, A* inner) const {
        A* bias_sums = sums + 3 * hidden;
        Vec<A> one = splat(A(1));
        vectors<A>(hidden, [&](int64_t j, auto w) RENORM_INLINE {
            Vec<A> r = sigmoid<A>(gate(0, pre, norms[0], x, j, w)), z = sigmoid<A>(gate(1, pre, norms[0], x, j, w));
            Vec<A> q = recurrent(pre, norms[1], j, w);
            Vec<A> n = hyperbolic_tangent<A>(entries(w, candidate_x + j) + r * q);
            Vec<A> d = entries(w, dh + j) + entries(w, dy + j), dn = d * (one - z) * (one - n * n), dq = dn * r;
            put<A>(w, dcandidate_x + j, dn);
            put<A>(w, dx + j, dn * q * r * (one - r));
            put<A>(w, dx + hidden + j, d * (entries(w, h_before + j) - n) * z * (one - z));
            put<A>(w, dh + j, d * z);
            put<A>(w, inner + j, dq);
            put<A>(w, bias_sums + j, entries(w, bias_sums + j) + dq);
        });
        norm_gradient(pre, norms[0], norm_weight, dx, 2 * hidden, dpre, sums);
        norm_gradient(pre + 2 * hidden, norms[1], norm_weight + 2 * hidden, inner, hidden, dpre + 2 * hidden,
                      sums + 2 * hidden);
    }
};

// ---- the sequence

// Where the rows of a step lie. The rows of all steps are packed without gaps; `before` and `after` are in the
// buffers of h and c, which hold the initial states, too.
struct RecurrentStep {
    int64_t rows, packed, before, after;
};

template <class A>
struct Sequence {
    const RecurrentJob& job;
    const RecurrentStep* steps;
    int64_t hidden, state, gates;
    int threads;
    bool by_rows;  // each thread has rows of its own, and else columns

    explicit Sequence(const RecurrentJob& job)
        : job(job), steps((const RecurrentStep*)job.table), hidden(job.hidden), state(job.state),
          gates((job.cell == kLSTM ? 4 : 3) * job.hidden) {
        int64_t weights = gates * state, products = count(job.rows) * weights;
        threads = int(most(1, least(job.threads, products / kProductsPerThread)));
        by_rows = weights * int64_t(sizeof(A)) <= kWeightsNear && job.rows >= threads * kRowsPerThread;
        if (!by_rows) threads = int(most(1, least(threads, job.rows * weights / kProductsPerMeeting)));
        by_rows = by_rows || threads == 1;
    }
    // How many there are of the first `rows` rows, in all steps.
    int64_t count(int64_t rows) const {
        int64_t n = 0;
        for (int64_t t = 0; t < job.steps; t++) n += least(rows, steps[t].rows);
        return n;
    }
    static const A* at(const void* base, int64_t row, int64_t width) { return (const A*)base + row * width; }
    static A* at(void* base, int64_t row, int64_t width) { return (A*)base + row * width; }

    // One thread's share.
    struct Share {
        const Sequence& all;
        int thread, team;
        int64_t first, last;  // rows
        Share(const Sequence& all, int thread, int team)
            : all(all), thread(thread), team(team), first(bound(thread)), last(bound(thread + 1)) {}

        int64_t bound(int k) const {  // sequences of unequal lengths: shares of about as many steps
            int64_t low = 0, high = all.job.rows, wanted = all.count(high) * k / team;
            if (k == team) return high;
            while (low < high) {
                int64_t middle = (low + high) / 2;
                if (all.count(middle) < wanted) {
                    low = middle + 1;
                } else {
                    high = middle;
                }
            }
            return low;
        }
        void wait() const {
            if (team > 1) meet();
        }
        void pack(Packed<A>& to, const void* weight, bool rows) const {
            to.fill((const A*)weight, rows, to.panels * thread / team, to.panels * (thread + 1) / team);
        }
        // Rows of a step in a loop over entries.
        int64_t begin(int64_t rows) const { return all.by_rows ? least(first, rows) : rows * thread / team; }
        int64_t end(int64_t rows) const { return all.by_rows ? least(last, rows) : rows * (thread + 1) / team; }

        void multiply(const A* a, const Packed<A>& b, A* c, int64_t rows, bool add = false) const {
            if (all.by_rows) {
                int64_t from = begin(rows);
                product(a + from * b.inner, b, c + from * b.columns, end(rows) - from, 0, b.panels, add);
            } else {
                wait();
                product(a, b, c, rows, b.panels * thread / team, b.panels * (thread + 1) / team, add);
                wait();
            }
        }
    };
};

template <class A>
bool recurrent_forward(const RecurrentJob& job) {
    Sequence<A> all(job);
    int64_t hidden = all.hidden, gates = all.gates;
    bool lstm = job.cell == kLSTM, projected = job.projection != nullptr;
    Packed<A> weight(all.state, gates), projection(projected ? hidden : 0, projected ? all.state : 0);
    Scratch<A> own_pre(job.pre ? 0 : job.rows * gates), own_raw(projected && !job.raw ? job.rows * hidden : 0);
    Scratch<A> scratch(all.threads * hidden);
    if (!weight.data || !projection.data || !own_pre || !own_raw || !scratch) return false;
    LSTM<A> with_cell(job);
    GRU<A> without(job);
    together(all.threads, [&](int thread, int team) {
        typename Sequence<A>::Share share(all, thread, team);
        share.pack(weight, job.weight, true);
        if (projected) share.pack(projection, job.projection, true);
        share.wait();
        for (int64_t t = 0; t < job.steps; t++) {
            RecurrentStep step = all.steps[t];
            const A* before = all.at((const void*)job.states, step.before, all.state);
            A* after = all.at(job.states, step.after, all.state);
            A* pre = job.pre ? all.at(job.pre, step.packed, gates) : own_pre.data;
            A* h = !projected ? after : job.raw ? all.at(job.raw, step.packed, hidden) : own_raw.data;
            share.multiply(before, weight, pre, step.rows);
            for (int64_t row = share.begin(step.rows); row < share.end(step.rows); row++) {
                Standardized<A> unkept[2], *norms = unkept;
                int64_t packed = step.packed + row;
                if (job.norms) norms = (Standardized<A>*)job.norms + 2 * packed;
                if (lstm) {
                    with_cell.forward(pre + row * gates, all.at(job.x, packed, gates),
                                      all.at((const void*)job.cells, step.before + row, hidden),
                                      all.at(job.cells, step.after + row, hidden), h + row * hidden, norms,
                                      scratch + thread * hidden);
                } else {
                    without.forward(pre + row * gates, all.at(job.x, packed, 2 * hidden),
                                    all.at(job.candidate_x, packed, hidden), before + row * hidden,
                                    h + row * hidden, norms);
                }
            }
            if (projected) share.multiply(h, projection, after, step.rows);
        }
    });
    return true;
}

template <class A>
bool recurrent_backward(const RecurrentJob& job) {
    Sequence<A> all(job);
    int64_t hidden = all.hidden, gates = all.gates, state = all.state;
    bool lstm = job.cell == kLSTM, projected = job.projection != nullptr;
    int64_t sums = gates + (lstm ? 2 : 1) * hidden, own = sums + hidden;  // of a thread: sums in A, scratch
    Packed<A> weight(gates, state), projection(projected ? state : 0, projected ? hidden : 0);
    Scratch<A> draw(projected ? job.rows * hidden : 0), scratch(all.threads * own);
    if (!weight.data || !projection.data || !draw || !scratch) return false;
    LSTM<A> with_cell(job);
    GRU<A> without(job);
    together(all.threads, [&](int thread, int team) {
        typename Sequence<A>::Share share(all, thread, team);
        share.pack(weight, job.weight, false);
        if (projected) share.pack(projection, job.projection, false);
        share.wait();
        A *mine = scratch + thread * own, *inner = mine + sums;
        int64_t summed = 0;
        for (int64_t t = job.steps - 1; t >= 0; t--) {
            RecurrentStep step = all.steps[t];
            int64_t begin = share.begin(step.rows), end = share.end(step.rows);
            if (projected) {
                A* dstates = all.at(job.dstates, step.packed, state);
                for (int64_t k = begin * state; k < end * state; k++)
                    dstates[k] = all.at(job.dy, step.packed, state)[k] + all.at(job.dh, 0, state)[k];
                share.multiply(dstates, projection, draw, step.rows);
            }
            for (int64_t row = begin; row < end; row++) {
                int64_t packed = step.packed + row;
                const A* pre = all.at((const void*)job.pre, packed, gates);
                const A* dy = all.at(job.dy, packed, state);
                A* dh = all.at(job.dh, row, state);
                const Standardized<A>* norms = (const Standardized<A>*)job.norms + 2 * packed;
                if (lstm) {
                    with_cell.backward(pre, all.at(job.x, packed, gates),
                                       all.at((const void*)job.cells, step.before + row, hidden),
                                       all.at((const void*)job.cells, step.after + row, hidden),
                                       projected ? draw + row * hidden : dy, projected ? nullptr : dh, norms,
                                       all.at(job.dc, row, hidden), all.at(job.dx, packed, gates),
                                       all.at(job.dpre, packed, gates), mine, inner);
                } else {
                    without.backward(pre, all.at(job.x, packed, 2 * hidden), all.at(job.candidate_x, packed, hidden),
                                     all.at((const void*)job.states, step.before + row, hidden), dy, dh, norms,
                                     all.at(job.dx, packed, 2 * hidden), all.at(job.dcandidate_x, packed, hidden),
                                     all.at(job.dpre, packed, gates), mine, inner);
                }
            }
            summed += end - begin;
            if (summed >= 64 || t == 0) {  // in double from here on
                double* to = job.sums + thread * sums;
                for (int64_t k = 0; k < sums; k++) {
                    to[k] += double(mine[k]);
                    mine[k] = A(0);
                }
                summed = 0;
            }
            share.multiply(all.at((const void*)job.dpre, step.packed, gates), weight, all.at(job.dh, 0, state),
                           step.rows, !lstm);
        }
    });
    return true;
}

static bool recurrent(const RecurrentJob& job) {
    bool back = job.dy != nullptr;
    if (job.dtype == kFloat64) return back ? recurrent_backward<double>(job) : recurrent_forward<double>(job);
    return back ? recurrent_backward<float>(job) : recurrent_forward<float>(job);
}
