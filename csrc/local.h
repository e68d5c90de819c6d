// Local response norm: y = x d^-beta, d = k + alpha * (sum of x^2 over the window of neighbouring channels).
//
// The sum of a window is never what is left of a longer one: subtraction would lose the digits of small neighbours of
// large entries. In *planes* (NCHW) a row of positions at a time enters a LocalWindow; in *pixels* (channels last) the
// vectors run along the channels, and Shifted adds what lies beside them.
//
// Computed in float while d^-(beta + 1) is a normal number; a tile with a larger d (by entries from 1e7 on, with the
// usual alpha and beta), also where a square overflows, is computed again in double.

constexpr int64_t kLocalScratch = 24 * 1024;  // bytes of the rows that stay in L1 beside the input
constexpr int64_t kLocalBlock = 512;          // entries of a block of pixels
constexpr int64_t kShifts = 8;                // windows up to here are added entry by entry

// Like `prefetch`, of memory that is written.
RENORM_ALWAYS inline void fetch_to_write(const void* p) {
#if defined(__GNUC__)
    __builtin_prefetch(p, 1, 3);
#else
    (void)p;
#endif
}

// ---- powers

// A short loop that GCC has unrolled is one it does not always vectorize.
#if defined(__GNUC__) && !defined(__clang__)
#define RENORM_LOOP _Pragma("GCC unroll 1")
#else
#define RENORM_LOOP
#endif

RENORM_ALWAYS inline float root(float value) {
#if defined(__GNUC__)
    return __builtin_sqrtf(value);
#else
    return sqrtf(value);
#endif
}
RENORM_ALWAYS inline double root(double value) {
#if defined(__GNUC__)
    return __builtin_sqrt(value);
#else
    return sqrt(value);
#endif
}
template <class A>
RENORM_ALWAYS inline Vec<A> root(Vec<A> v) {
    A lanes[kLanes<A>];
    std::memcpy(lanes, &v, sizeof v);
    RENORM_LOOP
    for (int i = 0; i < kLanes<A>; i++) lanes[i] = root(lanes[i]);
    std::memcpy(&v, lanes, sizeof v);
    return v;
}

// What a tile computes with.
template <class A>
struct Response {
    A alpha, beta, k, slope;  // slope: -2 alpha beta
    A beta_high, beta_low;    // beta in two parts: the first times an exponent is exact
    A limit;                  // of d, in float
    explicit Response(const LocalJob& job)
        : alpha(A(job.alpha)), beta(A(job.beta)), k(A(job.k)), slope(A(-2 * job.alpha * job.beta)) {
        beta_high = A(float_of(bits_of(float(job.beta)) & 0xfffff000u));
        beta_low = A(job.beta - double(beta_high));
        limit = A(job.beta > 0 ? pow(2.0, 60 / (1 + job.beta)) : 1);
    }
    // Whether float serves at all: d is never below k then, and only its largest has to be looked at.
    static bool suits_float(const LocalJob& job) {
        double limit = pow(2.0, 60 / (1 + job.beta));
        return job.alpha >= 1e-30 && job.alpha <= 1e30 && job.beta > 0 && job.beta <= 2 && job.k > 1 / limit &&
               job.k < limit;
    }
};

// d^-beta = 2^(-beta log2 d) to about 2 units in the last place, for normal d.
RENORM_ALWAYS inline float inverse_power(float d, const Response<float>& r) {
    uint32_t bits = bits_of(d);
    int32_t exponent = int32_t(bits - 0x3f3504f3u) >> 23;  // d = 2^exponent m with m from sqrt(1/2) to sqrt(2)
    float e = float(exponent), m = float_of(bits - (uint32_t(exponent) << 23));
    float s = (m - 1) / (m + 1), z = s * s;  // log m = 2 artanh s
    float tail = 0.57707802f + z * (0.41219858f + z * (0.32059890f + z * 0.26230819f));
    float log2 = s * 2.8853901f + s * z * (0.96179669f + z * tail);
    float high = -r.beta_high * e;
    float low = -r.beta_low * e - r.beta * log2;
    float whole = (high + low + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: rounds to an integer
    float f = (high - whole) + low;
    float power = 0.0013333558f + f * (1.5403530e-4f + f * 1.5252734e-5f);
    power = 1 + f * (0.69314718f + f * (0.24022651f + f * (0.055504109f + f * (0.0096181291f + f * power))));
    return power * float_of(uint32_t(int32_t(whole) + 127) << 23) + (d - d);  // NaN stays NaN
}
inline double inverse_power(double d, const Response<double>& r) { return pow(d, -r.beta); }

template <class A>
struct Inverse {
    Vec<A> power, one;  // d^-beta, 1 / d
};
template <class A>
RENORM_ALWAYS inline Inverse<A> inverse_any(Vec<A> d, const Response<A>& r) {
    A lanes[kLanes<A>];
    std::memcpy(lanes, &d, sizeof d);
    RENORM_LOOP
    for (int i = 0; i < kLanes<A>; i++) lanes[i] = inverse_power(lanes[i], r);
    Inverse<A> inverse;
    std::memcpy(&inverse.power, lanes, sizeof d);
    inverse.one = splat(A(1)) / d;
    return inverse;
}
template <class A>
RENORM_ALWAYS inline Inverse<A> inverse_three_quarters(Vec<A> d) {
    Vec<A> half = splat(A(1)) / root<A>(d);
    return {half * root<A>(half), half * half};
}
#if defined(__AVX512F__) && !defined(RENORM_PLAIN_LANES)
// Estimates good to 2^-14, then one step of Newton for p^-4 = d^3: a quarter of the time of roots and quotients.
template <>
RENORM_ALWAYS inline Inverse<float> inverse_three_quarters<float>(Vec<float> d) {
    Vec<float> half = _mm512_maskz_rsqrt14_ps(0xffff, d), quarter = _mm512_maskz_rsqrt14_ps(0xffff, half);
    Vec<float> p = half * half * quarter, dp = d * p;
    Vec<float> off = 1.0f - (dp * dp) * (dp * p);
    Vec<float> one = half * half;
    return {p + p * 0.25f * off, one + one * (1.0f - d * one)};
}
#endif
template <class A>
RENORM_ALWAYS inline Inverse<A> invert(Vec<A> d, const Response<A>& r) {
    if (r.beta == A(0.75)) return inverse_three_quarters<A>(d);
    if (r.beta == A(0.5)) {
        Vec<A> half = splat(A(1)) / root<A>(d);
        return {half, half * half};
    }
    if (r.beta == A(1)) {
        Vec<A> one = splat(A(1)) / d;
        return {one, one};
    }
    return inverse_any<A>(d, r);
}

// The largest d of a tile.
template <class A>
struct Largest {
    Vec<A> v = splat(A(0));
    void see(Vec<A> d) { v = choose<A>(v < d, d, v); }
    bool below(A limit) const {
        A lanes[kLanes<A>];
        std::memcpy(lanes, &v, sizeof v);
        bool all = true;
        for (int i = 0; i < kLanes<A>; i++) all = all && lanes[i] < limit;
        return all;
    }
};

// ---- planes: vectors run along the positions

// Sums of the last `num` rows pushed. Rows of the block being filled are summed forwards as they come, those of the
// block before were summed backwards when it was full; a window is the end of one and the beginning of the next.
template <class A>
struct LocalWindow {
    A *ring, *front, *zeros;
    int64_t num, size, slot = 0;
    bool full = false;  // there is a block before
    A* here;
    const A* oldest;

    static int64_t entries(int64_t num, int64_t size) { return (num + 2) * size; }
    LocalWindow(A* memory, int64_t num, int64_t size)
        : ring(memory), front(memory + num * size), zeros(front + size), num(num), size(size), here(ring),
          oldest(zeros) {
        std::memset(front, 0, size_t(2 * size) * sizeof(A));
    }
    Vec<A> push(int64_t i, Vec<A> v) const {
        Vec<A> sum = load<A>(front + i) + v;
        store<A>(here + i, v);
        store<A>(front + i, sum);
        return sum + load<A>(oldest + i);
    }
    void turn() {
        if (++slot == num) {
            for (int64_t i = 0; i < size; i += kLanes<A>) {
                Vec<A> sum = load<A>(ring + (num - 1) * size + i);
                for (int64_t row = num - 2; row > 0; row--) {
                    sum += load<A>(ring + row * size + i);
                    store<A>(ring + row * size + i, sum);
                }
            }
            std::memset(front, 0, size_t(size) * sizeof(A));
            slot = 0;
            full = true;
        }
        here = ring + slot * size;
        oldest = full && slot + 1 < num ? here + size : zeros;
    }
};

// f(position, place in a scratch row, whole or part): the last vector overlaps the one before where there is one.
template <class A, class F>
RENORM_ALWAYS inline void each_position(int64_t width, F f) {
    constexpr int w = kLanes<A>;
    int64_t i = 0;
    for (; i + w <= width; i += w) f(i, i, Whole{});
    if (i == width) return;
    if (width > w) {
        f(width - w, i, Whole{});
    } else {
        f(0, i, Part{width});
    }
}

struct LocalSizes {
    int64_t batch, channels, positions, batch_stride, channel_stride, position_stride;
    int64_t before, after, num;  // of the window, as far as there are channels
    bool planes;
    int64_t width, tasks;  // positions of a tile, tiles
    int64_t ahead;         // entries from what is read to what is fetched
    int64_t gap, row;      // pixels: zeros before the first, entries of a block from one to the next
    int64_t scratch;       // entries

    LocalSizes(const LocalJob& job, int lanes, int scratch_bytes, int bytes)  // of one entry
        : batch(job.batch), channels(job.channels), positions(job.positions), batch_stride(job.batch_stride),
          channel_stride(job.channel_stride), position_stride(job.position_stride) {
        before = least(job.before, channels - 1);
        after = least(job.after, channels - 1);
        num = before + after + 1;
        if (positions == 1 || batch_stride == positions * position_stride) {
            position_stride = positions == 1 ? batch_stride : position_stride;
            positions *= batch;
            batch = 1;
        }
        planes = position_stride == 1 && positions > 1;
        if (planes) {
            int64_t rows = job.dy ? 2 * (num + 2) + before + 1 : num + 2;
            width = most(4, kLocalScratch / scratch_bytes / rows / lanes) * lanes;
            int64_t tiles = (positions + width - 1) / width;
            width = ((positions + tiles - 1) / tiles + lanes - 1) / lanes * lanes;  // tiles of about one size
            scratch = rows * width;
            gap = row = 0;
            ahead = (kStreamAhead / bytes / width + 1) * channel_stride;
        } else {
            gap = (most(before, after) + lanes - 1) / lanes * lanes;
            row = (channels + most(before, after) + lanes - 1) / lanes * lanes;
            width = least(positions, most(1, kLocalBlock / row));
            scratch = (job.dy ? 4 : 2) * entries(lanes);
            ahead = kStreamAhead / bytes;
        }
        tasks = batch * ((positions + width - 1) / width);
    }
    int64_t entries(int lanes) const { return gap + width * row + 2 * num + 2 * lanes; }  // of a block of pixels
};

template <class T, class A>
bool planes_forward(const Response<A>& r, const LocalSizes& sizes, const T* x, T* y, int64_t width, A* scratch) {
    LocalWindow<A> window(scratch, sizes.num, sizes.width);
    Largest<A> largest;
    Vec<A> alpha = splat(r.alpha), k = splat(r.k);
    for (int64_t t = 0; t < sizes.channels + sizes.after; t++) {
        int64_t c = t - sizes.after;
        bool enters = t < sizes.channels, leaves = c >= 0;
        const T *x_t = x + t * sizes.channel_stride, *x_c = x + c * sizes.channel_stride;
        T* y_c = y + c * sizes.channel_stride;
        each_position<A>(width, [&](int64_t p, int64_t i, auto span) RENORM_INLINE {
            prefetch(x_t + p + sizes.ahead);
            fetch_to_write(y_c + p + sizes.ahead);
            Vec<A> v = enters ? get<A>(span, x_t + p, A(0)) : splat(A(0));
            Vec<A> sum = window.push(i, v * v);
            if (!leaves) return;
            Vec<A> d = k + alpha * sum;
            largest.see(d);
            put<A>(span, y_c + p, get<A>(span, x_c + p, A(0)) * invert(d, r).power);
        });
        window.turn();
    }
    return largest.below(r.limit);
}

// dx_i = dy_i d_i^-beta - 2 alpha beta x_i * (sum of dy_c x_c d_c^(-beta - 1) over the windows c that hold i).
template <class T, class A>
bool planes_backward(const Response<A>& r, const LocalSizes& sizes, const T* x, const T* dy, T* dx, int64_t width,
                     A* scratch) {
    int64_t size = sizes.width, rows = sizes.before + 1;
    LocalWindow<A> squares(scratch, sizes.num, size);
    LocalWindow<A> shares(scratch + LocalWindow<A>::entries(sizes.num, size), sizes.num, size);
    A* direct = scratch + 2 * LocalWindow<A>::entries(sizes.num, size);  // dy d^-beta of the last channels
    Largest<A> largest;
    Vec<A> alpha = splat(r.alpha), k = splat(r.k), slope = splat(r.slope), zero = splat(A(0));
    int64_t row_c = 0;
    for (int64_t t = 0; t < sizes.channels + sizes.after + sizes.before; t++) {
        int64_t c = t - sizes.after, i_channel = c - sizes.before;
        bool enters = t < sizes.channels, known = c >= 0 && c < sizes.channels, leaves = i_channel >= 0;
        const T *x_t = x + t * sizes.channel_stride, *x_c = x + c * sizes.channel_stride;
        const T *dy_c = dy + c * sizes.channel_stride, *x_i = x + i_channel * sizes.channel_stride;
        T* dx_i = dx + i_channel * sizes.channel_stride;
        A* direct_c = direct + row_c * size;
        if (c >= 0) row_c = row_c + 1 == rows ? 0 : row_c + 1;
        const A* direct_i = direct + row_c * size;  // the oldest
        each_position<A>(width, [&](int64_t p, int64_t i, auto span) RENORM_INLINE {
            prefetch(x_t + p + sizes.ahead);
            prefetch(dy_c + p + sizes.ahead);
            fetch_to_write(dx_i + p + sizes.ahead);
            Vec<A> v = enters ? get<A>(span, x_t + p, A(0)) : zero;
            Vec<A> sum = squares.push(i, v * v), share = zero;
            if (c < 0) return;
            if (known) {
                Vec<A> d = k + alpha * sum;
                largest.see(d);
                Inverse<A> inverse = invert(d, r);
                Vec<A> main = get<A>(span, dy_c + p, A(0)) * inverse.power;
                store<A>(direct_c + i, main);
                share = main * (get<A>(span, x_c + p, A(0)) * inverse.one);
            }
            sum = shares.push(i, share);
            if (!leaves) return;
            put<A>(span, dx_i + p, load<A>(direct_i + i) + slope * get<A>(span, x_i + p, A(0)) * sum);
        });
        squares.turn();
        if (c >= 0) shares.turn();
    }
    return largest.below(r.limit);
}

// ---- pixels: vectors run along the channels

// Sums over windows of entries of a block.
template <class A>
struct Shifted {
    A *q, *sums;  // sums: where there are too many shifts to add them one by one
    int64_t num, before;

    // By doubling: q comes to hold sums of `span` entries, `sums` those of as many as the low bits of num say.
    Shifted(A* q, A* sums, int64_t num, int64_t before, int64_t n) : q(q), sums(sums), num(num), before(before) {
        constexpr int w = kLanes<A>;
        if (num <= kShifts) return;
        int64_t done = 0;
        for (int64_t span = 1; span <= num; span *= 2) {
            bool wanted = (num & span) != 0, more = 2 * span <= num;
            for (int64_t i = 0; i < n + num; i += w) {
                Vec<A> v = load<A>(q + i);
                if (wanted && i < n) store<A>(sums + i, done ? load<A>(sums + i) + load<A>(q + i + done) : v);
                if (more) store<A>(q + i, v + load<A>(q + i + span));
            }
            if (wanted) done += span;
        }
    }
    Vec<A> at(int64_t place) const {
        if (num > kShifts) return load<A>(sums + place - before);
        const A* first = q + place - before;
        Vec<A> sum = load<A>(first);
        for (int64_t j = 1; j < num; j++) sum += load<A>(first + j);
        return sum;
    }
};

// f(offset in x, place in a block, whole or part)
template <class A, class F>
RENORM_ALWAYS inline void each_channel(const LocalSizes& sizes, int64_t width, F f) {
    constexpr int w = kLanes<A>;
    for (int64_t p = 0; p < width; p++) {
        int64_t offset = p * sizes.position_stride, place = sizes.gap + p * sizes.row, c = 0;
        for (; c + w <= sizes.channels; c += w) f(offset + c, place + c, Whole{});
        if (c < sizes.channels) f(offset + c, place + c, Part{sizes.channels - c});
    }
}

template <class T, class A>
inline Shifted<A> pixel_squares(const LocalSizes& sizes, const T* x, int64_t width, A* q, A* sums) {
    int64_t n = sizes.gap + width * sizes.row;
    std::memset(q, 0, size_t(n + sizes.num) * sizeof(A));
    each_channel<A>(sizes, width, [&](int64_t offset, int64_t place, auto span) RENORM_INLINE {
        prefetch(x + offset + sizes.ahead);
        Vec<A> v = get<A>(span, x + offset, A(0));
        store<A>(q + place, v * v);  // 0 beyond a part: the gap stays empty
    });
    return Shifted<A>(q, sums, sizes.num, sizes.before, n);
}

template <class T, class A>
bool pixels_forward(const Response<A>& r, const LocalSizes& sizes, const T* x, T* y, int64_t width, A* scratch) {
    Largest<A> largest;
    Vec<A> alpha = splat(r.alpha), k = splat(r.k);
    Shifted<A> squares = pixel_squares(sizes, x, width, scratch, scratch + sizes.entries(kLanes<A>));
    each_channel<A>(sizes, width, [&](int64_t offset, int64_t place, auto span) RENORM_INLINE {
        fetch_to_write(y + offset + sizes.ahead);
        Vec<A> d = k + alpha * squares.at(place);
        largest.see(d);
        put<A>(span, y + offset, get<A>(span, x + offset, A(0)) * invert(d, r).power);
    });
    return largest.below(r.limit);
}

template <class T, class A>
bool pixels_backward(const Response<A>& r, const LocalSizes& sizes, const T* x, const T* dy, T* dx, int64_t width,
                     A* scratch) {
    int64_t n = sizes.gap + width * sizes.row, entries = sizes.entries(kLanes<A>);
    A *direct = scratch, *q = scratch + entries, *sums = scratch + 2 * entries;
    Largest<A> largest;
    Vec<A> alpha = splat(r.alpha), k = splat(r.k), slope = splat(r.slope);
    Shifted<A> squares = pixel_squares(sizes, x, width, q, sums);
    A* share = scratch + 3 * entries;  // dy x d^(-beta - 1); 0 in the gaps
    std::memset(share, 0, size_t(n + sizes.num) * sizeof(A));
    each_channel<A>(sizes, width, [&](int64_t offset, int64_t place, auto span) RENORM_INLINE {
        prefetch(dy + offset + sizes.ahead);
        Vec<A> d = k + alpha * squares.at(place);
        largest.see(d);
        Inverse<A> inverse = invert(d, r);
        Vec<A> main = get<A>(span, dy + offset, A(0)) * inverse.power;
        store<A>(direct + place, main);
        put<A>(span, share + place, main * (get<A>(span, x + offset, A(0)) * inverse.one));
    });
    Shifted<A> shares(share, sums, sizes.num, sizes.after, n);
    each_channel<A>(sizes, width, [&](int64_t offset, int64_t place, auto span) RENORM_INLINE {
        fetch_to_write(dx + offset + sizes.ahead);
        Vec<A> main = load<A>(direct + place), v = get<A>(span, x + offset, A(0));
        put<A>(span, dx + offset, main + slope * v * shares.at(place));
    });
    return largest.below(r.limit);
}

// ---- the whole

template <class T, class A>
inline bool local_tile(const LocalJob& job, const Response<A>& r, const LocalSizes& sizes, int64_t task, A* scratch) {
    int64_t tiles = sizes.tasks / sizes.batch, p = task % tiles * sizes.width;
    int64_t offset = task / tiles * sizes.batch_stride + p * sizes.position_stride;
    int64_t width = least(sizes.width, sizes.positions - p);
    const T* x = (const T*)job.x + offset;
    T* out = (T*)job.out + offset;
    if (job.dy) {
        const T* dy = (const T*)job.dy + offset;
        return sizes.planes ? planes_backward(r, sizes, x, dy, out, width, scratch)
                            : pixels_backward(r, sizes, x, dy, out, width, scratch);
    }
    return sizes.planes ? planes_forward(r, sizes, x, out, width, scratch)
                        : pixels_forward(r, sizes, x, out, width, scratch);
}

template <class T>
bool local_as(const LocalJob& job) {
    using A = Acc<T>;
    if (job.batch * job.channels * job.positions == 0) return true;
    LocalSizes sizes(job, kLanes<A>, int(sizeof(A)), int(sizeof(T)));
    Response<A> r(job);
    Response<double> wide(job);
    bool in_float = sizeof(A) < sizeof(double) && Response<A>::suits_float(job);
    int64_t entries = job.batch * job.channels * job.positions;
    int threads = int(most(1, least(least(job.threads, sizes.tasks), entries / kEntriesPerThread)));
    Flag failed;
    parallel(threads, [&](int thread, int threads) {
        Scratch<double> scratch(sizes.scratch);
        if (!scratch.data) {
            failed.raise();
            return;
        }
        for (int64_t task = sizes.tasks * thread / threads; task < sizes.tasks * (thread + 1) / threads; task++) {
            if (in_float && local_tile<T, A>(job, r, sizes, task, (A*)scratch.data)) continue;
            local_tile<T, double>(job, wide, sizes, task, scratch.data);
        }
    });
    return !failed;
}

static bool local(const LocalJob& job) {
    switch (job.dtype) {
        case kFloat32: return local_as<float>(job);
        case kFloat64: return local_as<double>(job);
        case kBFloat16: return local_as<bf16>(job);
        default: return local_as<f16>(job);
    }
}
