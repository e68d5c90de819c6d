// Column kernels: the innermost loop runs over cells. Whole contiguous rows are swept, with tables of one number a
// column: sums in the dtype's accumulator for a block of rows, then in double.

constexpr int64_t kColumns = 2048;  // of a panel at most: its tables stay in L1
constexpr int64_t kNarrow = 128;    // columns below which a row is not worth reading in parts
constexpr int64_t kFirstRows = 64, kRows = 256;  // of a block
constexpr int64_t kMeanRows = 4;  // whose mean is the first shift

// How columns are handed out: panels of `width` columns and all r0 rows; or, where panels are too few for the
// threads, the rows of each outer index are split among them.
struct ColumnPlan {
    int64_t width, blocks, tasks;
    int threads;
    bool split;
    ColumnPlan(const Job& job, const Sizes& size, int64_t bytes_per_entry) {
        const Nest& nest = job.nest;
        threads = worth(job, size.cells * nest.r0);
        int64_t unit = nest.merge;  // a panel holds whole sets, and whole cache lines where it can
        while (unit < 16) unit += nest.merge;
        int64_t fits = kCache / (nest.r0 * bytes_per_entry) / unit * unit;
        int64_t wide = most(unit, kColumns / unit * unit);
        width = fits >= kNarrow ? least(fits, wide) : wide;
        if (size.outer < threads) {  // narrower, so that every thread has some
            int64_t share = (nest.k1 / threads + unit - 1) / unit * unit;
            if (share >= kNarrow) width = least(width, share);
        }
        blocks = (nest.k1 + width - 1) / width;
        width = least(nest.k1, ((nest.k1 + blocks - 1) / blocks + unit - 1) / unit * unit);  // as even as can be
        blocks = (nest.k1 + width - 1) / width;
        tasks = size.outer * blocks;
        split = !nest.along && tasks < 4 * threads && tasks % threads != 0 && nest.r0 >= kMeanRows * threads;
    }
};

template <class T>
struct ColumnMoments {
    using A = Acc<T>;
    Scratch<A> shift, s, q, count;
    Scratch<Cell<A>> cells;
    explicit ColumnMoments(int64_t width) : shift(width), s(width), q(width), count(width), cells(width) {}
    bool ok() const { return shift.data && s.data && q.data && count.data && cells.data; }
};

// Lines of cells that are sets, without parameters of their own.
template <class A>
inline void short_lines(A* table, int64_t width, const double* mean, const double* scale, int64_t n) {
    A *c = table, *a = table + width, *b = table + 2 * width;
    for (int64_t k = 0; k < n; k++) {
        c[k] = A(mean[k]);
        a[k] = A(scale[k]);
        b[k] = A((double(c[k]) - mean[k]) * scale[k]);
    }
}

template <class T>
struct ColumnForward : Forward<T> {
    using A = Acc<T>;
    using Forward<T>::job, Forward<T>::nest, Forward<T>::parameters, Forward<T>::x, Forward<T>::x_operand;
    using Forward<T>::size;
    ColumnForward(const Job& job, const Parameters<A>& parameters) : Forward<T>(job, parameters) {}

    int64_t at(int operand, int64_t k0, int64_t column, int64_t row) const {
        int64_t inner = operand == kMask ? nest.mask_inner : 1;
        return outer_offset(nest, operand, k0) + column * inner + row * nest.stride[operand][0];
    }
    void add(int64_t k0, int64_t first, int64_t n, int64_t row, int64_t rows) const {
        for (int64_t i = row; i < row + rows; i++) {
            int64_t out = at(kY, k0, first, i);
            row_add<T, A>((const T*)job.x + at(kX, k0, first, i), (const T*)job.residual + out, (T*)job.sum + out, n);
        }
    }
    void sums(const T* p, int64_t step, int64_t rows, int64_t n, const uint8_t* mask, ColumnMoments<T>& table) const {
        int64_t mask_step = nest.stride[kMask][0];
        mask ? column_moments<false, T, A>(p, step, rows, n, mask, mask_step, table.shift, table.s, table.q, table.count)
             : column_moments<true, T, A>(p, step, rows, n, mask, mask_step, table.shift, table.s, table.q, table.count);
    }
    // Sums over a block of rows about table.shift; masked rows are left out.
    double block(ColumnMoments<T>& table, int64_t k0, int64_t first, int64_t n, int64_t row, int64_t rows) const {
        const T* p = x + at(x_operand, k0, first, row);
        int64_t step = nest.stride[x_operand][0];
        if (!job.mask || nest.mask_inner) {
            const uint8_t* mask = job.mask ? job.mask + at(kMask, k0, first, row) : nullptr;
            sums(p, step, rows, n, mask, table);
            return mask ? 0 : double(rows);
        }
        double real_rows = 0;
        for (int64_t i = 0; i < rows; i++) {
            if (!job.mask[at(kMask, k0, first, row + i)]) continue;
            sums(p + i * step, step, 1, n, nullptr, table);
            real_rows++;
        }
        return real_rows;
    }
    static bool any_far(const ColumnMoments<T>& table, int64_t n, A rows) {
        int any = 0;
        for (int64_t k = 0; k < n; k++) any |= far(table.s[k], table.q[k], rows);
        return any != 0;
    }
    void measure(ColumnMoments<T>& table, int64_t k0, int64_t first, int64_t n, int64_t begin, int64_t end) const {
        for (int64_t k = 0; k < n; k++) {
            table.shift[k] = table.s[k] = table.q[k] = table.count[k] = A(0);
            table.cells[k].n = table.cells[k].s = table.cells[k].q = 0;
            table.cells[k].shift = A(0);
        }
        if (!job.about_zero && begin < end) {  // the mean of the first rows; of all where some are masked
            for (int64_t row = begin, stop = job.mask ? end : begin + 1, rows; row < stop; row += rows) {
                rows = least(job.mask ? kRows : kMeanRows, end - row);
                double real_rows = block(table, k0, first, n, row, rows);
                for (int64_t k = 0; k < n; k++) {
                    table.cells[k].n += real_rows + double(table.count[k]);
                    table.cells[k].s += double(table.s[k]);
                    table.s[k] = table.q[k] = table.count[k] = A(0);
                }
            }
            for (int64_t k = 0; k < n; k++) {
                Cell<A>& cell = table.cells[k];
                A mean = A(cell.s / cell.n);
                table.shift[k] = cell.shift = finite(mean) ? mean : A(0);
                cell.n = cell.s = 0;
            }
        }
        int64_t due = 2 * kFirstRows;
        for (int64_t row = begin; row < end;) {
            int64_t rows = least(least(kRows, most(kFirstRows, row - begin)), end - row);
            double real_rows = block(table, k0, first, n, row, rows);
            if (row == begin && !job.about_zero && !job.mask && any_far(table, n, A(rows))) {
                for (int64_t k = 0; k < n; k++) {
                    A mean = table.s[k] / A(rows);
                    if (finite(mean)) table.shift[k] = table.cells[k].shift = table.shift[k] + mean;
                    table.s[k] = table.q[k] = A(0);
                }
                block(table, k0, first, n, row, rows);
            }
            for (int64_t k = 0; k < n; k++) {
                Cell<A>& cell = table.cells[k];
                double s = table.s[k], q = table.q[k];
                if (!finite(table.q[k])) {
                    int64_t mask_step = job.mask ? nest.stride[kMask][0] : 0;
                    wide_moments(x + at(x_operand, k0, first + k, row), rows, nest.stride[x_operand][0],
                                 job.mask ? job.mask + at(kMask, k0, first + k, row) : nullptr, mask_step, cell.shift, s, q);
                }
                cell.n += real_rows + double(table.count[k]);
                cell.s += s;
                cell.q += q;
                table.s[k] = table.q[k] = table.count[k] = A(0);
            }
            row += rows;
            if (!job.about_zero && row - begin >= due && row < end) {
                for (int64_t k = 0; k < n; k++) {
                    if (table.cells[k].n > 0) table.cells[k].shift_to_mean();
                    table.shift[k] = table.cells[k].shift;
                }
                due = 2 * (row - begin);
            }
        }
    }
    // Sets of few entries (layer norm over channels), where what is done for each set costs as much as its entries:
    // measure, finish and lines in loops that vectorize. False where a column needs the careful way.
    bool measure_short(ColumnMoments<T>& table, A* line, int64_t width, int64_t k0, int64_t first, int64_t n) const {
        if (job.mask || nest.merge != 1 || nest.r0 > kRows || job.measured || (nest.params && !nest.along)) return false;
        const A *s = table.s, *q = table.q, *shift = table.shift;
        memset((void*)table.s.data, 0, size_t(n) * sizeof(A));
        memset((void*)table.q.data, 0, size_t(n) * sizeof(A));
        memset((void*)table.shift.data, 0, size_t(n) * sizeof(A));
        if (!job.about_zero) {
            int64_t rows = least(8, nest.r0);  // by 4, what ReLU leaves would often need the careful way
            block(table, k0, first, n, 0, rows);
            for (int64_t k = 0; k < n; k++) table.shift[k] = s[k] * (A(1) / A(rows));
            memset((void*)table.s.data, 0, size_t(n) * sizeof(A));
            memset((void*)table.q.data, 0, size_t(n) * sizeof(A));
        }
        block(table, k0, first, n, 0, nest.r0);
        int careful = 0;
        A rows = A(nest.r0);
        bool zero_mean = job.about_zero != 0;
        for (int64_t k = 0; k < n; k++)
            careful |= !finite(q[k]) | !finite(shift[k]) | (!zero_mean & far(s[k], q[k], rows));
        if (careful) return false;
        double part = 1.0 / double(nest.r0), eps = job.eps;
        double* mean = job.stats + k0 * nest.k1 + first;
        double *var = mean + size.sets, *count = var + size.sets, *scale = count + size.sets;
        for (int64_t k = 0; k < n; k++) {
            double d = zero_mean ? 0.0 : double(s[k]) * part, v = double(q[k]) * part - d * d;
            mean[k] = double(shift[k]) + d;
            var[k] = v < 0 ? 0 : v;
            count[k] = double(nest.r0);
        }
        for (int64_t k = 0; k < n; k++) scale[k] = 1.0 / sqrt(var[k] + eps);
        if (!job.affine) short_lines(line, width, mean, scale, n);
        return true;
    }
    void lines(Scratch<A>& table, int64_t width, int64_t k0, int64_t first, int64_t n) const {
        for (int64_t k = 0; k < n; k++) {
            Line<A> line = this->line(k0 * nest.k1 + first + k);
            table[k] = line.c, table[width + k] = line.a, table[2 * width + k] = line.b;
        }
    }
    void apply(const A* table, int64_t width, int64_t k0, int64_t first, int64_t n, int64_t row, int64_t rows) const {
        if (job.mask && !nest.mask_inner && rows > 1) {
            for (int64_t i = 0; i < rows; i++) apply(table, width, k0, first, n, row + i, 1);
            return;
        }
        const T* p = x + at(x_operand, k0, first, row);
        T* y = (T*)job.y + at(kY, k0, first, row);
        const uint8_t* mask = job.mask ? job.mask + at(kMask, k0, first, row) : nullptr;
        if (mask && !nest.mask_inner) {
            if (!*mask) return zero(y, n);
            mask = nullptr;
        }
        auto run = [&](auto kernel) {
            kernel(p, nest.stride[x_operand][0], y, nest.stride[kY][0], rows, n, mask, nest.stride[kMask][0],
                   Lines<A>{table, table + width, table + 2 * width}, parameters.w + row, parameters.b + row,
                   act_of<A>(job));
        };
        bool plain = !mask && !job.activation;
        if (nest.along) {
            plain ? run(column_apply<true, true, T, A>) : run(column_apply<false, true, T, A>);
        } else {
            plain ? run(column_apply<true, false, T, A>) : run(column_apply<false, false, T, A>);
        }
    }
};

template <class T>
struct ColumnScratch {
    ColumnMoments<T> moments;
    Scratch<Acc<T>> lines;
    ColumnScratch(int64_t width) : moments(width), lines(3 * width) {}
    bool ok() const { return moments.ok() && lines.data; }
};

// Each thread has panels of columns of its own, which it reads again while they are in the cache.
template <class T>
bool column_forward_in_panels(const ColumnForward<T>& kernel, const ColumnPlan& plan) {
    const Job& job = kernel.job;
    const Nest& nest = kernel.nest;
    Flag short_of_memory;
    parallel(plan.threads, [&](int thread, int threads) {
        ColumnScratch<T> own(plan.width);
        if (!own.ok()) {
            short_of_memory.raise();
            return;
        }
        for (int64_t task = plan.tasks * thread / threads; task < plan.tasks * (thread + 1) / threads; task++) {
            int64_t k0 = task / plan.blocks, first = task % plan.blocks * plan.width;
            int64_t n = least(plan.width, nest.k1 - first), set = (k0 * nest.k1 + first) / nest.merge;
            if (job.residual) kernel.add(k0, first, n, 0, nest.r0);
            bool done = kernel.measure_short(own.moments, own.lines, plan.width, k0, first, n);
            if (!job.measured && !done) {
                kernel.measure(own.moments, k0, first, n, 0, nest.r0);
                for (int64_t s = 0; s < n / nest.merge; s++)
                    kernel.finish(own.moments.cells + s * nest.merge, nest.merge, set + s);
            }
            if (!job.y) continue;
            if (!done || job.affine) kernel.lines(own.lines, plan.width, k0, first, n);
            kernel.apply(own.lines, plan.width, k0, first, n, 0, nest.r0);
        }
    });
    return !short_of_memory;
}

// Too few panels: all threads share each outer index, some rows each, in phases.
template <class T>
bool column_forward_by_rows(const ColumnForward<T>& kernel, const ColumnPlan& plan) {
    using A = Acc<T>;
    const Job& job = kernel.job;
    const Nest& nest = kernel.nest;
    Scratch<Cell<A>> cells(nest.k1 * plan.threads);
    Scratch<A> lines(3 * nest.k1);
    if (!cells || !lines) return false;
    Flag short_of_memory;
    for (int64_t k0 = 0; k0 < kernel.size.outer; k0++) {
        if (!job.measured || job.residual) {
            // The team may be smaller than the one that was asked for, and than the last one.
            memset((void*)cells.data, 0, size_t(nest.k1 * plan.threads) * sizeof(Cell<A>));
            parallel(plan.threads, [&](int thread, int threads) {
                int64_t begin = nest.r0 * thread / threads, end = nest.r0 * (thread + 1) / threads;
                ColumnMoments<T> own(plan.width);
                if (!own.ok()) {
                    short_of_memory.raise();
                    return;
                }
                for (int64_t first = 0; first < nest.k1; first += plan.width) {
                    int64_t n = least(plan.width, nest.k1 - first);
                    if (job.residual) kernel.add(k0, first, n, begin, end - begin);
                    if (job.measured) continue;
                    kernel.measure(own, k0, first, n, begin, end);
                    for (int64_t k = 0; k < n; k++) cells[(first + k) * plan.threads + thread] = own.cells[k];
                }
            });
            if (short_of_memory) return false;
            for (int64_t s = 0; s < nest.k1 / nest.merge; s++)
                kernel.finish(cells + s * nest.merge * plan.threads, nest.merge * plan.threads,
                              k0 * nest.k1 / nest.merge + s);
        }
        if (!job.y) continue;
        kernel.lines(lines, nest.k1, k0, 0, nest.k1);
        parallel(plan.threads, [&](int thread, int threads) {
            int64_t begin = nest.r0 * thread / threads, end = nest.r0 * (thread + 1) / threads;
            kernel.apply(lines, nest.k1, k0, 0, nest.k1, begin, end - begin);
        });
    }
    return true;
}

template <class T>
bool column_forward(const Job& job) {
    Parameters<Acc<T>> parameters(job);
    if (!parameters.ok) return false;
    ColumnForward<T> kernel(job, parameters);
    ColumnPlan plan(job, kernel.size, sizeof(T));
    return plan.split ? column_forward_by_rows(kernel, plan) : column_forward_in_panels(kernel, plan);
}

// ---- backward

template <class T>
struct ColumnBackward : Backward<T> {
    using A = Acc<T>;
    using Backward<T>::job, Backward<T>::nest, Backward<T>::parameters;
    ColumnBackward(const Job& job, const Parameters<A>& parameters, double* sums) : Backward<T>(job, parameters, sums) {}

    int64_t at(int operand, int64_t k0, int64_t column, int64_t row) const {
        int64_t inner = operand == kMask ? nest.mask_inner : 1;
        return outer_offset(nest, operand, k0) + column * inner + row * nest.stride[operand][0];
    }
    // f(row, rows, mask) over rows begin..end, in one piece where the mask does not go by rows; mask null and
    // `real` false where a row is masked.
    template <class F>
    void visit(int64_t k0, int64_t first, int64_t begin, int64_t end, F f) const {
        if (!job.mask || nest.mask_inner) {
            f(begin, end - begin, job.mask ? job.mask + at(kMask, k0, first, begin) : nullptr, true);
            return;
        }
        for (int64_t row = begin; row < end; row++) f(row, int64_t(1), nullptr, job.mask[at(kMask, k0, first, row)] != 0);
    }
    // Adds the sums over rows begin..end to s1 and s2; block: two tables, 0 before and after.
    void reduce(Lines<A> line, A* block, int64_t k0, int64_t first, int64_t n, int64_t begin, int64_t end, double* s1,
                double* s2) const {
        A *b1 = block, *b2 = block + n;
        for (int64_t start = begin; start < end; start += kRows) {
            visit(k0, first, start, least(start + kRows, end), [&](int64_t row, int64_t rows, const uint8_t* mask, bool real) {
                if (!real) return;
                auto run = [&](auto kernel) {
                    kernel((const T*)job.x + at(kX, k0, first, row), nest.stride[kX][0],
                           (const T*)job.dy + at(kY, k0, first, row), nest.stride[kY][0], rows, n, mask,
                           nest.stride[kMask][0], line, parameters.w + row, parameters.b + row, act_of<A>(job), b1, b2);
                };
                bool plain = !mask && !job.activation;
                if (nest.along) {
                    plain ? run(column_reduce<true, true, T, A>) : run(column_reduce<false, true, T, A>);
                } else {
                    plain ? run(column_reduce<true, false, T, A>) : run(column_reduce<false, false, T, A>);
                }
            });
            for (int64_t k = 0; k < n; k++) {
                s1[k] += double(b1[k]);
                s2[k] += double(b2[k]);
                b1[k] = b2[k] = A(0);
            }
        }
    }
    bool is_short() const {  // as in measure_short
        return nest.merge == 1 && !(nest.params && !nest.along) && !job.affine && !job.combine && !job.fixed && !job.sums;
    }
    void lines(A* table, int64_t width, int64_t k0, int64_t first, int64_t n) const {
        if (is_short()) {
            const double* mean = job.stats + k0 * nest.k1 + first;
            short_lines(table, width, mean, mean + 3 * this->size.sets, n);
            return;
        }
        for (int64_t k = 0; k < n; k++) {
            Line<A> line = this->line(k0 * nest.k1 + first + k);
            table[k] = line.c, table[width + k] = line.a, table[2 * width + k] = line.b;
        }
    }
    // Rows 3 to 5 of the table: what dx is made of.
    void combines(A* table, int64_t width, int64_t k0, int64_t first, int64_t n) const {
        if (is_short()) {
            int64_t at = k0 * nest.k1 + first, sets = this->size.sets;
            const double *mean = job.stats + at, *count = mean + 2 * sets, *scale = mean + 3 * sets;
            const double *s1 = this->g1 + at, *s2 = this->g2 + at;
            const A *c = table, *a = table + width;
            A *by_a = table + 3 * width, *by_b = table + 4 * width, *by_d = table + 5 * width;
            double centered = job.about_zero ? 0 : 1;
            for (int64_t k = 0; k < n; k++) {
                double part = 1 / (count[k] > 0 ? count[k] : 1), away = mean[k] - double(c[k]);
                double along = scale[k] * scale[k] * scale[k] * (s2[k] - away * s1[k]) * part;
                by_a[k] = a[k];
                by_b[k] = A(-along);
                by_d[k] = A(along * away - centered * scale[k] * s1[k] * part);
            }
            return;
        }
        for (int64_t k = 0; k < n;) {
            int64_t cell = k0 * nest.k1 + first + k;
            SetGradient gradient = this->solve(cell / nest.merge);
            for (int64_t stop = k + nest.merge; k < stop; k++, cell++) {
                Combine<A> by = this->combine(cell, gradient);
                table[3 * width + k] = by.a, table[4 * width + k] = by.b, table[5 * width + k] = by.d;
            }
        }
    }
    void apply(const A* table, int64_t width, int64_t k0, int64_t first, int64_t n, int64_t begin, int64_t end, double* dw,
               double* dv) const {
        visit(k0, first, begin, end, [&](int64_t row, int64_t rows, const uint8_t* mask, bool real) {
            int64_t out = at(kY, k0, first, row);
            T* dx = job.dx ? (T*)job.dx + out : nullptr;
            const T* dsum = job.dsum ? (const T*)job.dsum + out : nullptr;
            if (!real) {
                if (dx && dsum) memcpy((void*)dx, (const void*)dsum, size_t(n) * sizeof(T));
                else if (dx) zero(dx, n);
                return;
            }
            auto run = [&](auto kernel) {
                kernel((const T*)job.x + at(kX, k0, first, row), nest.stride[kX][0], (const T*)job.dy + out, dsum, dx,
                       nest.stride[kY][0], rows, n, mask, nest.stride[kMask][0],
                       Lines<A>{table, table + width, table + 2 * width},
                       Combines<A>{table + 3 * width, table + 4 * width, table + 5 * width}, parameters.w + row,
                       parameters.b + row, dw ? dw + row : nullptr, dv ? dv + row : nullptr, act_of<A>(job));
            };
            bool plain = !mask && !job.activation;
            if (nest.along) {
                plain ? run(column_combine<true, true, T, A>) : run(column_combine<false, true, T, A>);
            } else {
                plain ? run(column_combine<true, false, T, A>) : run(column_combine<false, false, T, A>);
            }
        });
    }
};

template <class T>
bool column_backward_by_rows(const ColumnBackward<T>& kernel, const ColumnPlan& plan) {
    using A = Acc<T>;
    const Job& job = kernel.job;
    const Nest& nest = kernel.nest;
    Scratch<double> parts(2 * nest.k1 * plan.threads);
    Scratch<A> table(6 * nest.k1);
    if (!parts || !table) return false;
    Flag short_of_memory;
    for (int64_t k0 = 0; k0 < kernel.size.outer; k0++) {
        kernel.lines(table, nest.k1, k0, 0, nest.k1);
        if (!job.combine) {
            memset(parts.data, 0, size_t(2 * nest.k1 * plan.threads) * sizeof(double));
            parallel(plan.threads, [&](int thread, int threads) {
                Scratch<A> block(2 * plan.width);
                if (!block) {
                    short_of_memory.raise();
                    return;
                }
                double* part = parts + 2 * nest.k1 * thread;
                for (int64_t first = 0; first < nest.k1; first += plan.width) {
                    Lines<A> line = {table + first, table + nest.k1 + first, table + 2 * nest.k1 + first};
                    kernel.reduce(line, block, k0, first, least(plan.width, nest.k1 - first),
                                  nest.r0 * thread / threads, nest.r0 * (thread + 1) / threads, part + first,
                                  part + nest.k1 + first);
                }
            });
            if (short_of_memory) return false;
            for (int thread = 0; thread < plan.threads; thread++)
                for (int64_t k = 0; k < nest.k1; k++) {
                    kernel.g1[k0 * nest.k1 + k] += parts[2 * nest.k1 * thread + k];
                    kernel.g2[k0 * nest.k1 + k] += parts[2 * nest.k1 * thread + nest.k1 + k];
                }
        }
        kernel.combines(table, nest.k1, k0, 0, nest.k1);
        if (!job.dx) continue;
        parallel(plan.threads, [&](int thread, int threads) {
            kernel.apply(table, nest.k1, k0, 0, nest.k1, nest.r0 * thread / threads, nest.r0 * (thread + 1) / threads,
                         nullptr, nullptr);
        });
    }
    return collect(job, kernel.g1, kernel.g2, kernel.size.cells);
}

template <class T>
bool column_backward_in_panels(const ColumnBackward<T>& kernel, const ColumnPlan& plan) {
    using A = Acc<T>;
    const Job& job = kernel.job;
    const Nest& nest = kernel.nest;
    bool wants = nest.along && (job.dweight || job.dbias);
    int64_t along = wants ? nest.r0 : 0;
    Scratch<double> tables(2 * along * plan.threads);
    if (!tables) return false;
    Flag short_of_memory;
    parallel(plan.threads, [&](int thread, int threads) {
        Scratch<A> table(6 * plan.width), block(2 * plan.width);
        if (!table || !block) {
            short_of_memory.raise();
            return;
        }
        double *dw = tables + 2 * along * thread, *dv = dw + along;
        for (int64_t task = plan.tasks * thread / threads; task < plan.tasks * (thread + 1) / threads; task++) {
            int64_t k0 = task / plan.blocks, first = task % plan.blocks * plan.width;
            int64_t n = least(plan.width, nest.k1 - first), cell = k0 * nest.k1 + first;
            kernel.lines(table, plan.width, k0, first, n);
            if (!job.combine) {
                Lines<A> line = {table, table + plan.width, table + 2 * plan.width};
                kernel.reduce(line, block, k0, first, n, 0, nest.r0, kernel.g1 + cell, kernel.g2 + cell);
            }
            kernel.combines(table, plan.width, k0, first, n);
            if (!job.dx && !wants) continue;
            kernel.apply(table, plan.width, k0, first, n, 0, nest.r0, wants ? dw : nullptr, wants ? dv : nullptr);
        }
    });
    if (short_of_memory) return false;
    return nest.along ? collect_along(job, tables, along, plan.threads)
                      : collect(job, kernel.g1, kernel.g2, kernel.size.cells);
}

template <class T>
bool column_backward(const Job& job) {
    Parameters<Acc<T>> parameters(job);
    Sizes size(job.nest);
    Scratch<double> sums(2 * size.cells);
    if (!parameters.ok || !sums) return false;
    ColumnBackward<T> kernel(job, parameters, sums);
    ColumnPlan plan(job, size, 2 * sizeof(T));
    return plan.split ? column_backward_by_rows(kernel, plan) : column_backward_in_panels(kernel, plan);
}
