// What the row and the column kernels share: threads, scratch memory, moments, parameters.

constexpr int64_t kBlock = 2048;            // entries summed in the dtype's accumulator before double takes over
constexpr int64_t kEntriesPerThread = 16384;  // below this a thread costs more than it brings
constexpr int64_t kCache = 256 * 1024;      // bytes of a panel that is read twice; a part of the usual L2

constexpr int64_t kNear = 16 * 1024;         // the same, for what fits L1

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// f(thread, threads), by so many of torch's threads. All of them wake up for it: a team of another size than torch's would
// make libgomp end threads now and start them again at the next team (pytorch#32008).
template <class F>
inline void parallel(int threads, F f) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel
        {
            int team = int(least(threads, omp_get_num_threads()));
            if (omp_get_thread_num() < team) f(omp_get_thread_num(), team);
        }
        return;
    }
#endif
    f(0, 1);
}
// What any thread may raise.
struct Flag {
    int raised = 0;
    void raise() {
#ifdef _OPENMP
#pragma omp atomic write
#endif
        raised = 1;
    }
    operator bool() const { return raised != 0; }
};

inline int worth(const Job& job, int64_t entries) {
    return int(most(1, least(job.threads, entries / kEntriesPerThread)));
}

// Zeroed memory, aligned to a vector; null where there is none.
template <class A>
struct Scratch {
    void* memory;
    A* data;
    explicit Scratch(int64_t n) : memory(calloc(size_t(n) * sizeof(A) + 64, 1)) {
        data = memory ? (A*)(((uintptr_t)memory + 63) & ~(uintptr_t)63) : nullptr;
    }
    ~Scratch() { free(memory); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    operator A*() const { return data; }
};

struct Sizes {
    int64_t outer, cells, sets, per_cell;
    explicit Sizes(const Nest& nest) {
        outer = 1;
        for (int64_t d = 0; d < nest.outer_dims; d++) outer *= nest.outer_size[d];
        cells = outer * nest.k1;
        sets = cells / nest.merge;
        per_cell = nest.r0 * nest.r1;
    }
};

inline int64_t outer_offset(const Nest& nest, int operand, int64_t index) {
    const int64_t* stride = nest.stride[operand] + 2;
    if (nest.outer_dims == 1) return index * stride[0];
    int64_t offset = 0;
    for (int64_t d = nest.outer_dims - 1; d >= 0; d--) {
        offset += index % nest.outer_size[d] * stride[d];
        index /= nest.outer_size[d];
    }
    return offset;
}

// ---- moments

// Shifted sums. The shift is near the mean of what has been seen: an error of eps in sums about it is one of eps in
// the variance, times at most 2 (the shift moves whenever the count has doubled).
template <class A>
struct Cell {
    double n, s, q, due;
    A shift;

    void shift_to_mean() {
        double by = double(A(double(shift) + s / n)) - double(shift);
        if (!(by - by == 0)) return;
        shift = A(double(shift) + by);
        q += by * (n * by - 2 * s);
        s -= n * by;
    }
    double mean() const { return n > 0 ? double(shift) + s / n : 0; }
    double squares() const {  // sum of (x - mean)^2
        double m2 = n > 0 ? q - s * s / n : 0;
        return m2 < 0 ? 0 : m2;
    }
};

template <class A>
inline bool finite(A value) {
    return value - value == A(0);
}

// Whether the shift was more than 2.5 deviations from the mean: the sums about it have lost a digit. (With 4, the
// variance was off by up to 7e-6 of itself, with 2.5 by 2e-6, over steps of every place and height.)
template <class A>
inline bool far(A s, A q, A n) {
    return 29 * s * s > 25 * q * n;  // mean^2 > 6.25 (q / n - mean^2), without dividing
}

// A block in which float sums overflow: once more, entry by entry in double. NaN and infinity come here too.
template <class T, class A>
inline void wide_moments(const T* x, int64_t n, int64_t step, const uint8_t* mask, int64_t mask_step, A shift, double& s,
                         double& q) {
    s = q = 0;
    for (int64_t i = 0; i < n; i++) {
        if (mask && !mask[i * mask_step]) continue;
        double d = double(widen(x[i * step])) - double(shift);
        s += d;
        q += d * d;
    }
}

struct SetMoments {
    double mean, var, count;
};

// Moments of `num` cells taken together (Chan, Golub & LeVeque 1983).
template <class A>
inline SetMoments together(const Cell<A>* cells, int64_t num, bool about_zero) {
    double n = 0, sum = 0, m2 = 0;
    for (int64_t i = 0; i < num; i++) n += cells[i].n;
    if (n == 0) return {0, 1, 0};
    if (about_zero) {
        for (int64_t i = 0; i < num; i++) m2 += cells[i].q;
        return {0, m2 / n, n};
    }
    if (num == 1) {  // one division, where there may be as many sets as entries in a row
        double part = 1 / n, var = (cells->q - cells->s * cells->s * part) * part;
        return {double(cells->shift) + cells->s * part, var < 0 ? 0 : var, n};
    }
    for (int64_t i = 0; i < num; i++) sum += cells[i].n * cells[i].mean();
    double mean = sum / n;
    for (int64_t i = 0; i < num; i++) {
        const Cell<A>& cell = cells[i];
        double away = cell.mean() - mean;
        m2 += cell.squares() + cell.n * away * away;
    }
    return {mean, m2 / n, n};
}

// ---- coefficients

template <class A>
struct Parameters {
    Scratch<A> w, b;
    bool ok;
    Parameters(const Job& job)
        : w(job.nest.params), b(job.nest.params), ok(w.data && b.data) {
        if (!ok) return;
        for (int64_t i = 0; i < job.nest.params; i++) {
            w[i] = A(job.weight ? at(job.weight, job.param_dtype, i) : 1);
            b[i] = A(job.bias ? at(job.bias, job.param_dtype, i) : 0);
        }
    }
    static double at(const void* values, int dtype, int64_t i) {
        switch (dtype) {
            case kFloat32: return ((const float*)values)[i];
            case kFloat64: return ((const double*)values)[i];
            case kBFloat16: return widen(((const bf16*)values)[i]);
            default: return widen(((const f16*)values)[i]);
        }
    }
};

inline void put_parameter(void* values, int dtype, int64_t i, double value) {
    switch (dtype) {
        case kFloat32: ((float*)values)[i] = float(value); break;
        case kFloat64: ((double*)values)[i] = value; break;
        case kBFloat16: narrow(float(value), ((bf16*)values)[i]); break;
        default: narrow(float(value), ((f16*)values)[i]); break;
    }
}

inline int64_t parameter_of(const Nest& nest, int64_t cell) { return cell / nest.param_div % nest.params; }

// Scale, center and shift of a set: y = (x - center) scale + shift.
struct Standard {
    double scale, center, shift, mean, var, count;
    Standard(const Job& job, int64_t set, int64_t sets) {
        mean = job.stats[set];
        var = job.stats[sets + set];
        count = job.stats[2 * sets + set];
        if (job.affine) {
            scale = job.affine[set];
            center = job.affine[sets + set];
            shift = job.affine[2 * sets + set];
        } else {
            scale = job.stats[3 * sets + set];
            center = job.about_zero ? 0 : mean;
            shift = 0;
        }
    }
};

// The line of one cell about `pivot`, rounded to A; what rounding the pivot loses goes into b.
template <class A>
inline Line<A> line_of(const Standard& set, double pivot, double w, double b) {
    A c = A(pivot);
    return {c, A(set.scale * w), A(b + (set.shift - (set.center - double(c)) * set.scale) * w)};
}

template <class A>
inline Act<A> act_of(const Job& job) {
    return {job.activation, A(job.slope)};
}

// Gradients of one cell from g1 = sum of g and g2 = sum of g (x - c).
struct CellGradient {
    double weight, bias, scaled;  // of the parameters; of the scale, before the weight
    CellGradient(const Standard& set, double c, double g1, double g2) {
        scaled = g2 - (set.center - c) * g1;
        weight = set.scale * scaled + set.shift * g1;
        bias = g1;
    }
};

// dx = A g + B (x - c) + D for a set, by its sums s1 = sum of g w and s2 = sum of g w x_hat.
struct SetGradient {
    double b = 0, d = 0;
    SetGradient(const Job& job, const Standard& set, double c, double s1, double s2, int64_t index, int64_t sets) {
        if (job.combine) {
            b = job.combine[index];
            d = job.combine[sets + index];
        } else if (!job.fixed && set.count > 0) {
            double along = set.scale * set.scale * s2 / set.count;
            b = -along;
            d = along * (set.center - c) - (job.about_zero ? 0 : set.scale * s1 / set.count);
        }
    }
};

// Sums the cells' parameter gradients over the cells that share a parameter.
inline bool collect(const Job& job, const double* dw, const double* db, int64_t cells) {
    if (!job.nest.params || !(job.dweight || job.dbias)) return true;
    Scratch<double> sums(2 * job.nest.params);
    if (!sums) return false;
    for (int64_t cell = 0, p; cell < cells; cell++) {
        p = parameter_of(job.nest, cell);
        sums[p] += dw[cell];
        sums[job.nest.params + p] += db[cell];
    }
    for (int64_t p = 0; p < job.nest.params; p++) {
        if (job.dweight) put_parameter(job.dweight, job.param_dtype, p, sums[p]);
        if (job.dbias) put_parameter(job.dbias, job.param_dtype, p, sums[job.nest.params + p]);
    }
    return true;
}

// The same where the parameters run along: of each thread a table of `along` sums for the weight, then for the bias.
inline bool collect_along(const Job& job, const double* tables, int64_t along, int threads) {
    for (int64_t p = 0; p < along; p++) {
        double w = 0, b = 0;
        for (int thread = 0; thread < threads; thread++) {
            w += tables[2 * along * thread + p];
            b += tables[2 * along * thread + along + p];
        }
        if (job.dweight) put_parameter(job.dweight, job.param_dtype, p, w);
        if (job.dbias) put_parameter(job.dbias, job.param_dtype, p, b);
    }
    return true;
}

// For a solve of one's own: gradients of scale, center and shift of each set.
inline void affine_gradient(const Job& job, const Standard& set, double s1, double scaled, int64_t index, int64_t sets) {
    job.sums[index] = scaled;
    job.sums[sets + index] = -set.scale * s1;
    job.sums[2 * sets + index] = s1;
}

// ---- what a forward and a backward know of their sets

template <class T>
struct Forward {
    using A = Acc<T>;
    const Job& job;
    const Nest& nest;
    Sizes size;
    const Parameters<A>& parameters;
    const T* x;  // or the sum with the residual, which lies as y
    int x_operand;

    Forward(const Job& job, const Parameters<A>& parameters)
        : job(job), nest(job.nest), size(job.nest), parameters(parameters) {
        x = (const T*)(job.residual ? job.sum : job.x);
        x_operand = job.residual ? kY : kX;
    }
    void finish(const Cell<A>* cells, int64_t num, int64_t set) const {
        if (job.measured) return;
        SetMoments found = together(cells, num, job.about_zero != 0);
        job.stats[set] = found.mean;
        job.stats[size.sets + set] = found.var;
        job.stats[2 * size.sets + set] = found.count;
        job.stats[3 * size.sets + set] = 1 / sqrt(found.var + job.eps);
    }
    Line<A> line(int64_t cell) const {
        Standard set(job, cell / nest.merge, size.sets);
        double w = 1, b = 0;
        if (nest.params && !nest.along) {
            int64_t p = parameter_of(nest, cell);
            w = parameters.w[p], b = parameters.b[p];
        }
        return line_of<A>(set, set.center, w, b);
    }
};

template <class T>
struct Backward {
    using A = Acc<T>;
    const Job& job;
    const Nest& nest;
    Sizes size;
    const Parameters<A>& parameters;
    double *g1, *g2;  // of each cell: sums, then the gradients of its weight and bias

    Backward(const Job& job, const Parameters<A>& parameters, double* sums)
        : job(job), nest(job.nest), size(job.nest), parameters(parameters), g1(sums), g2(sums + size.cells) {}

    double weight(int64_t cell) const {
        return nest.params && !nest.along ? double(parameters.w[parameter_of(nest, cell)]) : 1.0;
    }
    Line<A> line(int64_t cell) const {  // about the mean, whatever the center
        Standard set(job, cell / nest.merge, size.sets);
        double b = nest.params && !nest.along ? double(parameters.b[parameter_of(nest, cell)]) : 0.0;
        return line_of<A>(set, job.about_zero ? 0 : set.mean, weight(cell), b);
    }
    // From the sums of a set's cells: what dx needs, and in place of the sums the parameters' gradients.
    SetGradient solve(int64_t index) const {
        Standard set(job, index, size.sets);
        double c = double(A(job.about_zero ? 0 : set.mean)), s1 = 0, scaled = 0;
        for (int64_t cell = index * nest.merge; cell < (index + 1) * nest.merge; cell++) {
            CellGradient gradient(set, c, g1[cell], g2[cell]);
            double w = weight(cell);
            s1 += w * g1[cell];
            scaled += w * gradient.scaled;
            g1[cell] = gradient.weight;
            g2[cell] = gradient.bias;
        }
        if (job.sums) affine_gradient(job, set, s1, scaled, index, size.sets);
        return SetGradient(job, set, c, s1, set.scale * scaled, index, size.sets);
    }
    Combine<A> combine(int64_t cell, const SetGradient& gradient) const {
        return {A(Standard(job, cell / nest.merge, size.sets).scale * weight(cell)), A(gradient.b), A(gradient.d)};
    }
};
