// The merge on a CUDA device: the arithmetic of kernels/reference.py, operation by operation.
//
// All rounded operations use intrinsics with an explicit rounding mode (__dadd_rn and so on), so the
// compiler can neither fuse nor reorder them, and results are bit-identical to those of the CPU.
// Each thread processes VECTOR adjacent pixels, with wide loads where all maps are aligned. All maps
// of a partial are loaded before the first is used, so that many memory streams are active at once.
// Tables of addresses are passed by value and therefore stored in constant memory.
//
// The tests also compile this file for the CPU, where they define the few CUDA names that it uses.
// Use no other features of CUDA.

#define VECTOR 4
#define MOST_POSES 5
#define MOST_SOURCES 16

typedef long long int64;

// Addresses of the accumulator's maps; count is 0 if the count is a single number.
struct Kept {
    int64 mip, best_partial, sum, squared_sum, count;
    int64 pose[MOST_POSES];
};

// Addresses of a partial's maps. best_partial and count are 0 if they are single numbers. Sums are
// float32 or float64, according to their sizes in bytes.
struct Source {
    int64 mip, best_partial, sum, squared_sum, count;
    int64 pose[MOST_POSES];
    int64 number, one_count, sum_nbytes, squared_sum_nbytes;
};

struct Sources {
    struct Source source[MOST_SOURCES];
};

// Addresses of the maps that finalise reads and writes; pose is used for indexed poses only.
struct Finished {
    int64 mip, sum, squared_sum, count, index;
    int64 z, mean, std, rounded_sum, rounded_squared_sum;
    int64 pose[MOST_POSES];
    int64 euler_angles, defocus_values, pixel_values;
    int64 n_orientations, n_defocus, n_pixel_sizes;
};

template <typename T, int V>
struct alignas(sizeof(T) * V > 16 ? 16 : sizeof(T) * V) Pack {
    T at[V];
};

template <typename T, int V>
__device__ inline Pack<T, V> load(int64 address, int64 at)
{
    return *reinterpret_cast<const Pack<T, V> *>(reinterpret_cast<const T *>(address) + at);
}

template <typename T, int V>
__device__ inline void store(int64 address, int64 at, const Pack<T, V> &values)
{
    *reinterpret_cast<Pack<T, V> *>(reinterpret_cast<T *>(address) + at) = values;
}

template <int V>
__device__ inline Pack<double, V> load_sum(int64 address, int64 nbytes, int64 at)
{
    if (nbytes == 8) return load<double, V>(address, at);
    Pack<float, V> narrow = load<float, V>(address, at);
    Pack<double, V> wide;
    for (int v = 0; v < V; v++) wide.at[v] = (double)narrow.at[v];
    return wide;
}

__device__ inline float minus_infinity() { return __int_as_float((int)0xff800000); }

template <typename T>
__device__ inline bool is_finite(T value) { return value - value == 0; }

// Whether a correlation is NaN or +inf; -inf means that nothing was searched.
__device__ inline bool not_a_mip(float value) { return !(value < __int_as_float(0x7f800000)); }

__device__ inline float not_a_number() { return __int_as_float(0x7fc00000); }

// P is the number of pose maps; n_poses is 0 for explicit poses. An unusable value sets found.
template <int V, int P>
__device__ inline void fold_pixels(const Kept &kept, const Sources &sources, int n_sources,
                                   int n_poses, int fresh, int64 at, int64 *found)
{
    Pack<float, V> mip;
    Pack<int, V> best, pose[P];
    Pack<double, V> sum, squared_sum;
    Pack<int64, V> count;
    const int not_searched = n_poses ? -1 : 0x7fc00000;  // an index, or the bits of NaN
    if (fresh) {
        for (int v = 0; v < V; v++) {
            mip.at[v] = minus_infinity();
            best.at[v] = -1;
            sum.at[v] = squared_sum.at[v] = 0.0;
            count.at[v] = 0;
            for (int p = 0; p < P; p++) pose[p].at[v] = not_searched;
        }
    } else {
        mip = load<float, V>(kept.mip, at);
        best = load<int, V>(kept.best_partial, at);
        sum = load<double, V>(kept.sum, at);
        squared_sum = load<double, V>(kept.squared_sum, at);
        if (kept.count) count = load<int64, V>(kept.count, at);
        for (int p = 0; p < P; p++) pose[p] = load<int, V>(kept.pose[p], at);
    }
    for (int s = 0; s < n_sources; s++) {
        const Source &source = sources.source[s];
        Pack<float, V> new_mip = load<float, V>(source.mip, at);
        Pack<int, V> new_pose[P];
        for (int p = 0; p < P; p++) new_pose[p] = load<int, V>(source.pose[p], at);
        Pack<double, V> new_sum = load_sum<V>(source.sum, source.sum_nbytes, at);
        Pack<double, V> new_squared_sum =
            load_sum<V>(source.squared_sum, source.squared_sum_nbytes, at);
        Pack<int, V> new_best;
        if (source.best_partial) {
            new_best = load<int, V>(source.best_partial, at);
        } else {
            for (int v = 0; v < V; v++) new_best.at[v] = (int)source.number;
        }
        bool bad = false;
        for (int v = 0; v < V; v++) {
            float value = new_mip.at[v];
            bool searched = value > minus_infinity();
            bool won = value > mip.at[v];
            bad |= not_a_mip(value) || !is_finite(new_sum.at[v]) ||
                   !is_finite(new_squared_sum.at[v]);
            if (n_poses) {
                int index = new_pose[0].at[v];
                won |= value == mip.at[v] && index < pose[0].at[v] && searched;
                bad |= index < -1 || index >= n_poses || (index == -1 && searched);
            } else {
                for (int p = 0; p < P; p++) {
                    bad |= searched && !is_finite(__int_as_float(new_pose[p].at[v]));
                }
            }
            if (won) {
                mip.at[v] = value;
                best.at[v] = new_best.at[v];
                for (int p = 0; p < P; p++) pose[p].at[v] = new_pose[p].at[v];
            }
            sum.at[v] = __dadd_rn(sum.at[v], new_sum.at[v]);
            squared_sum.at[v] = __dadd_rn(squared_sum.at[v], new_squared_sum.at[v]);
        }
        if (kept.count) {
            Pack<int64, V> more;
            if (source.count) {
                more = load<int64, V>(source.count, at);
            } else {
                for (int v = 0; v < V; v++) more.at[v] = source.one_count;
            }
            for (int v = 0; v < V; v++) count.at[v] += more.at[v];
        }
        if (bad) *found = 1;
    }
    store<float, V>(kept.mip, at, mip);
    store<int, V>(kept.best_partial, at, best);
    store<double, V>(kept.sum, at, sum);
    store<double, V>(kept.squared_sum, at, squared_sum);
    if (kept.count) store<int64, V>(kept.count, at, count);
    for (int p = 0; p < P; p++) store<int, V>(kept.pose[p], at, pose[p]);
}

template <int P>
__device__ inline void fold_thread(const Kept &kept, const Sources &sources, int n_sources,
                                   int n_poses, int fresh, int64 n, int aligned, int64 *found)
{
    int64 at = ((int64)blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    if (aligned && at + VECTOR <= n) {
        fold_pixels<VECTOR, P>(kept, sources, n_sources, n_poses, fresh, at, found);
    } else {
        for (int64 end = at + VECTOR < n ? at + VECTOR : n; at < end; at++) {
            fold_pixels<1, P>(kept, sources, n_sources, n_poses, fresh, at, found);
        }
    }
}

#define FOLD_KERNEL(NAME, P)                                                                      \
    extern "C" __global__ void NAME(Kept kept, Sources sources, int n_sources, int n_poses,       \
                                    int fresh, int64 n, int aligned, int64 *found)             \
    {                                                                                             \
        fold_thread<P>(kept, sources, n_sources, n_poses, fresh, n, aligned, found);           \
    }

FOLD_KERNEL(fold_indexed, 1)
FOLD_KERNEL(fold_4_poses, 4)
FOLD_KERNEL(fold_5_poses, 5)

// Compute mean, standard deviation, z-score, float32 sums, and the poses of indices. The number of
// indices outside the search space is added to findings; their poses are NaN.
extern "C" __global__ void finalise(Finished maps, double one_count, int64 n, int64 *findings)
{
    int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n) return;
    float highest = load<float, 1>(maps.mip, at).at[0];
    double sum = load<double, 1>(maps.sum, at).at[0];
    double squared_sum = load<double, 1>(maps.squared_sum, at).at[0];
    double count = maps.count ? __ll2double_rn(load<int64, 1>(maps.count, at).at[0]) : one_count;
    double mean = __ddiv_rn(sum, count);
    double variance = __dsub_rn(__ddiv_rn(squared_sum, count), __dmul_rn(mean, mean));
    double std = __dsqrt_rn(variance < 0 ? 0.0 : variance);
    double z = std == 0 ? 0.0 : __ddiv_rn(__dsub_rn((double)highest, mean), std);
    reinterpret_cast<float *>(maps.z)[at] =
        highest == minus_infinity() ? not_a_number() : __double2float_rn(z);
    reinterpret_cast<float *>(maps.mean)[at] =
        count == 0 ? not_a_number() : __double2float_rn(mean);
    reinterpret_cast<float *>(maps.std)[at] = count == 0 ? not_a_number() : __double2float_rn(std);
    reinterpret_cast<float *>(maps.rounded_sum)[at] = __double2float_rn(sum);
    reinterpret_cast<float *>(maps.rounded_squared_sum)[at] = __double2float_rn(squared_sum);
    if (!maps.index) return;
    int64 index = load<int, 1>(maps.index, at).at[0];
    int64 per_pixel_size = maps.n_orientations * maps.n_defocus;
    if (index < 0 || index >= per_pixel_size * maps.n_pixel_sizes) {
        for (int p = 0; p < MOST_POSES; p++) {
            reinterpret_cast<float *>(maps.pose[p])[at] = not_a_number();
        }
        if (index >= 0) atomicAdd((unsigned long long *)findings, 1ULL);
        return;
    }
    int64 orientation = index % maps.n_orientations;
    int64 defocus = index / maps.n_orientations % maps.n_defocus;
    for (int p = 0; p < 3; p++) {
        reinterpret_cast<float *>(maps.pose[p])[at] =
            load<float, 1>(maps.euler_angles, 3 * orientation + p).at[0];
    }
    reinterpret_cast<float *>(maps.pose[3])[at] = load<float, 1>(maps.defocus_values, defocus).at[0];
    reinterpret_cast<float *>(maps.pose[4])[at] =
        load<float, 1>(maps.pixel_values, index / per_pixel_size).at[0];
}

// Copy a partial, made idle where any of its maps is NaN or infinite; a pose counts only where the
// partial searched. The copy has a map of counts.
extern "C" __global__ void mask_nan(Source from, Source to, int n_pose_maps, int indexed, int64 n)
{
    int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= n) return;
    float mip = load<float, 1>(from.mip, at).at[0];
    double sum = load_sum<1>(from.sum, from.sum_nbytes, at).at[0];
    double squared_sum = load_sum<1>(from.squared_sum, from.squared_sum_nbytes, at).at[0];
    bool searched = mip > minus_infinity();
    bool bad = not_a_mip(mip) || !is_finite(sum) || !is_finite(squared_sum);
    int pose[MOST_POSES];
    for (int p = 0; p < MOST_POSES; p++) {
        pose[p] = p < n_pose_maps ? load<int, 1>(from.pose[p], at).at[0] : 0;
        bad |= !indexed && searched && !is_finite(__int_as_float(pose[p]));
    }
    for (int p = 0; p < MOST_POSES; p++) {
        if (p >= n_pose_maps) break;
        reinterpret_cast<int *>(to.pose[p])[at] = bad ? (indexed ? -1 : 0x7fc00000) : pose[p];
    }
    reinterpret_cast<float *>(to.mip)[at] = bad ? minus_infinity() : mip;
    if (to.sum_nbytes == 8) {
        reinterpret_cast<double *>(to.sum)[at] = bad ? 0.0 : sum;
    } else {
        reinterpret_cast<float *>(to.sum)[at] = bad ? 0.0f : __double2float_rn(sum);
    }
    if (to.squared_sum_nbytes == 8) {
        reinterpret_cast<double *>(to.squared_sum)[at] = bad ? 0.0 : squared_sum;
    } else {
        reinterpret_cast<float *>(to.squared_sum)[at] = bad ? 0.0f : __double2float_rn(squared_sum);
    }
    int64 count = from.count ? load<int64, 1>(from.count, at).at[0] : from.one_count;
    reinterpret_cast<int64 *>(to.count)[at] = bad ? 0 : count;
}
