// Column kernels: the innermost loop runs over cells. Whole contiguous rows are swept, with tables of one number a
// column: sums in the dtype's accumulator for a block of rows, then in double.

constexpr int64_t kColumns = 2048;  // of a panel at most: its tables stay in L1
constexpr int64_t kNarrow = 128;    // columns below which a row is not worth reading in parts
constexpr int64_t kFirstRows = 64, kRows = 256;  // of a block

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
        width = least(width, nest.k1);
        blocks = (nest.k1 + width - 1) / width;
        tasks = size.outer * blocks;
        split = !nest.along && tasks < 4 * threads && tasks % threads != 0;
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
    // Sums over a block of rows about table.shift; masked rows are left out.
    double block(ColumnMoments<T>& table, int64_t k0, int64_t first, int64_t n, int64_t row, int64_t rows) const {
        const T* p = x + at(x_operand, k0, first, row);
        int64_t step = nest.stride[x_operand][0];
        if (!job.mask || nest.mask_inner) {
            const uint8_t* mask = job.mask ? job.mask + at(kMask, k0, first, row) : nullptr;
            column_moments<T, A>(p, step, rows, n, mask, nest.stride[kMask][0], table.shift, table.s, table.q, table.count);
            return mask ? 0 : double(rows);
        }
        double real_rows = 0;
        for (int64_t i = 0; i < rows; i++) {
            if (!job.mask[at(kMask, k0, first, row + i)]) continue;
            column_moments<T, A>(p + i * step, step, 1, n, nullptr, 0, table.shift, table.s, table.q, table.count);
            real_rows++;
        }
        return real_rows;
    }
    void measure(ColumnMoments<T>& table, int64_t k0, int64_t first, int64_t n, int64_t begin, int64_t end) const {
        for (int64_t k = 0; k < n; k++) {
            table.shift[k] = table.s[k] = table.q[k] = table.count[k] = A(0);
            table.cells[k].n = table.cells[k].s = table.cells[k].q = 0;
            table.cells[k].shift = A(0);
        }
        if (!job.about_zero) {  // the mean of the first rows; of all where some are masked
            int64_t rows = least(job.mask ? end - begin : 16, end - begin);
            double real_rows = block(table, k0, first, n, begin, rows);
            for (int64_t k = 0; k < n; k++) {
                A mean = table.s[k] / (table.count[k] + A(real_rows));
                table.shift[k] = table.cells[k].shift = finite(mean) ? mean : A(0);
                table.s[k] = table.q[k] = table.count[k] = A(0);
            }
        }
        int64_t due = 2 * kFirstRows;
        for (int64_t row = begin; row < end;) {
            int64_t rows = least(least(kRows, most(kFirstRows, row - begin)), end - row);
            double real_rows = block(table, k0, first, n, row, rows);
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
    void lines(Scratch<A>& table, int64_t width, int64_t k0, int64_t first, int64_t n) const {
        for (int64_t k = 0; k < n; k++) {
            Line<A> line = this->line(k0 * nest.k1 + first + k);
            table[k] = line.c, table[width + k] = line.a, table[2 * width + k] = line.b;
        }
    }
    void apply(const Scratch<A>& table, int64_t width, int64_t k0, int64_t first, int64_t n, int64_t row) const {
        const T* p = x + at(x_operand, k0, first, row);
        T* y = (T*)job.y + at(kY, k0, first, row);
        const uint8_t* mask = job.mask ? job.mask + at(kMask, k0, first, row) : nullptr;
        if (mask && !nest.mask_inner) {
            if (!*mask) return zero(y, n);
            mask = nullptr;
        }
        Lines<A> line = {table, table + width, table + 2 * width};
        if (nest.along) {
            column_apply_along<T, A>(p, y, n, mask, line, parameters.w[row], parameters.b[row], act_of<A>(job));
        } else {
            column_apply<T, A>(p, y, n, mask, line, act_of<A>(job));
        }
    }
};

// Runs `make(thread)` scratch for each thread; false where memory is short.
template <class T>
struct ColumnScratch {
    ColumnMoments<T> moments;
    Scratch<Acc<T>> lines;
    ColumnScratch(int64_t width) : moments(width), lines(3 * width) {}
    bool ok() const { return moments.ok() && lines.data; }
};

template <class T>
bool column_forward(const Job& job) {
    using A = Acc<T>;
    Parameters<A> parameters(job);
    if (!parameters.ok) return false;
    ColumnForward<T> kernel(job, parameters);
    const Nest& nest = job.nest;
    ColumnPlan plan(job, kernel.size, sizeof(T));
    if (!plan.split) {
        bool short_of_memory = false;
        parallel(plan.threads, [&](int thread, int threads) {
            ColumnScratch<T> own(plan.width);
            if (!own.ok()) {
                short_of_memory = true;
                return;
            }
            for (int64_t task = plan.tasks * thread / threads; task < plan.tasks * (thread + 1) / threads; task++) {
                int64_t k0 = task / plan.blocks, first = task % plan.blocks * plan.width;
                int64_t n = least(plan.width, nest.k1 - first), set = (k0 * nest.k1 + first) / nest.merge;
                if (job.residual) kernel.add(k0, first, n, 0, nest.r0);
                if (!job.measured) {
                    kernel.measure(own.moments, k0, first, n, 0, nest.r0);
                    for (int64_t s = 0; s < n / nest.merge; s++)
                        kernel.finish(own.moments.cells + s * nest.merge, nest.merge, set + s);
                }
                if (!job.y) continue;
                kernel.lines(own.lines, plan.width, k0, first, n);
                for (int64_t row = 0; row < nest.r0; row++) kernel.apply(own.lines, plan.width, k0, first, n, row);
            }
        });
        return !short_of_memory;
    }
    Scratch<Cell<A>> cells(nest.k1 * plan.threads);
    Scratch<A> lines(3 * nest.k1);
    if (!cells || !lines) return false;
    bool short_of_memory = false;
    for (int64_t k0 = 0; k0 < kernel.size.outer; k0++) {
        if (!job.measured || job.residual) {
            parallel(plan.threads, [&](int thread, int threads) {
                int64_t begin = nest.r0 * thread / threads, end = nest.r0 * (thread + 1) / threads;
                ColumnMoments<T> own(plan.width);
                if (!own.ok()) {
                    short_of_memory = true;
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
            for (int64_t row = nest.r0 * thread / threads; row < nest.r0 * (thread + 1) / threads; row++)
                kernel.apply(lines, nest.k1, k0, 0, nest.k1, row);
        });
    }
    return true;
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
    // The mask of a row; false where none of it is real.
    bool mask_of(int64_t k0, int64_t first, int64_t row, const uint8_t*& mask) const {
        mask = job.mask ? job.mask + at(kMask, k0, first, row) : nullptr;
        if (!mask || nest.mask_inner) return true;
        bool any = *mask != 0;
        mask = nullptr;
        return any;
    }
    A weight_of(int64_t row) const { return nest.along ? parameters.w[row] : A(1); }
    A bias_of(int64_t row) const { return nest.along ? parameters.b[row] : A(0); }

    // Adds the sums over rows begin..end to s1 and s2; block: two tables, 0 before and after.
    void reduce(Lines<A> line, A* block, int64_t k0, int64_t first, int64_t n, int64_t begin, int64_t end, double* s1,
                double* s2) const {
        bool plain = !job.mask && !job.activation && !nest.along;
        A *b1 = block, *b2 = block + n;
        for (int64_t start = begin; start < end; start += kRows) {
            int64_t row = start, stop = least(start + kRows, end);
            for (; plain && row + 4 <= stop; row += 4)
                column_reduce_four<T, A>((const T*)job.x + at(kX, k0, first, row), nest.stride[kX][0],
                                         (const T*)job.dy + at(kY, k0, first, row), nest.stride[kY][0], n, line.c, b1, b2);
            for (; row < stop; row++) {
                const uint8_t* mask;
                if (!mask_of(k0, first, row, mask)) continue;
                column_reduce<T, A>((const T*)job.x + at(kX, k0, first, row), (const T*)job.dy + at(kY, k0, first, row), n,
                                    mask, line, weight_of(row), bias_of(row), act_of<A>(job), b1, b2);
            }
            for (int64_t k = 0; k < n; k++) {
                s1[k] += double(b1[k]);
                s2[k] += double(b2[k]);
                b1[k] = b2[k] = A(0);
            }
        }
    }
    void lines(A* table, int64_t width, int64_t k0, int64_t first, int64_t n) const {
        for (int64_t k = 0; k < n; k++) {
            Line<A> line = this->line(k0 * nest.k1 + first + k);
            table[k] = line.c, table[width + k] = line.a, table[2 * width + k] = line.b;
        }
    }
    // Rows 3 to 5 of the table: what dx is made of.
    void combines(A* table, int64_t width, int64_t k0, int64_t first, int64_t n) const {
        for (int64_t k = 0; k < n;) {
            int64_t cell = k0 * nest.k1 + first + k;
            SetGradient gradient = this->solve(cell / nest.merge);
            for (int64_t stop = k + nest.merge; k < stop; k++, cell++) {
                Combine<A> by = this->combine(cell, gradient);
                table[3 * width + k] = by.a, table[4 * width + k] = by.b, table[5 * width + k] = by.d;
            }
        }
    }
    void apply(const A* table, int64_t width, int64_t k0, int64_t first, int64_t n, int64_t row, double* dw,
               double* dv) const {
        int64_t out = at(kY, k0, first, row);
        T* dx = job.dx ? (T*)job.dx + out : nullptr;
        const T* dsum = job.dsum ? (const T*)job.dsum + out : nullptr;
        const uint8_t* mask;
        if (!mask_of(k0, first, row, mask)) {
            if (dx && dsum) memcpy((void*)dx, (const void*)dsum, size_t(n) * sizeof(T));
            else if (dx) zero(dx, n);
            return;
        }
        Lines<A> line = {table, table + width, table + 2 * width};
        Combines<A> by = {table + 3 * width, table + 4 * width, table + 5 * width};
        column_combine<T, A>((const T*)job.x + at(kX, k0, first, row), (const T*)job.dy + out, dsum, dx, n, mask, line, by,
                             weight_of(row), bias_of(row), dw, dv, act_of<A>(job));
    }
};

template <class T>
bool column_backward(const Job& job) {
    using A = Acc<T>;
    Parameters<A> parameters(job);
    Sizes size(job.nest);
    Scratch<double> sums(2 * size.cells);
    if (!parameters.ok || !sums) return false;
    ColumnBackward<T> kernel(job, parameters, sums);
    const Nest& nest = job.nest;
    ColumnPlan plan(job, size, 2 * sizeof(T));
    bool reduces = !job.combine, wants = nest.along && (job.dweight || job.dbias);
    bool short_of_memory = false;
    if (plan.split) {
        Scratch<double> parts(2 * nest.k1 * plan.threads);
        Scratch<A> table(6 * nest.k1);
        if (!parts || !table) return false;
        for (int64_t k0 = 0; k0 < size.outer; k0++) {
            kernel.lines(table, nest.k1, k0, 0, nest.k1);
            if (reduces) {
                memset(parts.data, 0, size_t(2 * nest.k1 * plan.threads) * sizeof(double));
                parallel(plan.threads, [&](int thread, int threads) {
                    Scratch<A> block(2 * plan.width);
                    if (!block) {
                        short_of_memory = true;
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
                for (int64_t row = nest.r0 * thread / threads; row < nest.r0 * (thread + 1) / threads; row++)
                    kernel.apply(table, nest.k1, k0, 0, nest.k1, row, nullptr, nullptr);
            });
        }
        return collect(job, sums, sums + size.cells, size.cells);
    }
    int64_t along = wants ? nest.r0 : 0;
    Scratch<double> tables(2 * along * plan.threads);
    if (!tables) return false;
    parallel(plan.threads, [&](int thread, int threads) {
        Scratch<A> table(6 * plan.width), block(2 * plan.width);
        if (!table || !block) {
            short_of_memory = true;
            return;
        }
        double *dw = tables + 2 * along * thread, *dv = dw + along;
        for (int64_t task = plan.tasks * thread / threads; task < plan.tasks * (thread + 1) / threads; task++) {
            int64_t k0 = task / plan.blocks, first = task % plan.blocks * plan.width;
            int64_t n = least(plan.width, nest.k1 - first), cell = k0 * nest.k1 + first;
            kernel.lines(table, plan.width, k0, first, n);
            if (reduces) {
                Lines<A> line = {table, table + plan.width, table + 2 * plan.width};
                kernel.reduce(line, block, k0, first, n, 0, nest.r0, kernel.g1 + cell, kernel.g2 + cell);
            }
            kernel.combines(table, plan.width, k0, first, n);
            if (!job.dx && !wants) continue;
            for (int64_t row = 0; row < nest.r0; row++)
                kernel.apply(table, plan.width, k0, first, n, row, wants ? dw + row : nullptr, wants ? dv + row : nullptr);
        }
    });
    if (short_of_memory) return false;
    if (!nest.along) return collect(job, sums, sums + size.cells, size.cells);
    for (int64_t p = 0; p < along; p++) {
        double w = 0, b = 0;
        for (int thread = 0; thread < plan.threads; thread++) {
            w += tables[2 * along * thread + p];
            b += tables[2 * along * thread + along + p];
        }
        if (job.dweight) put_parameter(job.dweight, job.param_dtype, p, w);
        if (job.dbias) put_parameter(job.dbias, job.param_dtype, p, b);
    }
    return true;
}
