// Decoding of chunks on a CUDA device: LZ4 streams, and the shuffles that Blosc applies before them.
//
// A Blosc frame is a sequence of blocks, and a block of one LZ4 stream, or of one per byte of a
// value. Streams are independent: a warp decodes one, as all its lanes read the same token and copy
// the bytes together. Offsets and sizes of streams come from the frame's tables, which the host has
// checked; what is inside of a stream may be anything, so every read and write is checked here.
//
// The tests also compile this file for the CPU, with one lane, like merge.cu.

#ifndef LANES
#define LANES 32
#endif

typedef unsigned char byte;
typedef unsigned long long uint64;

// One stream: offsets in the frame and in the decoded, still shuffled chunk, and sizes in bytes.
struct Stream {
    int64 from, encoded_nbytes, to, decoded_nbytes;
};

__device__ inline void copy_bytes(const byte *from, byte *to, int64 n, int lane)
{
    for (int64 i = lane; i < n; i += LANES) to[i] = from[i];
}

// Read the rest of a length that did not fit its token; false at the end of the stream.
__device__ inline bool read_length(const byte *from, int64 n_from, int64 &at, int64 &length)
{
    byte more;
    do {
        if (at >= n_from) return false;
        more = from[at++];
        length += more;
    } while (more == 255);
    return true;
}

// Decode an LZ4 stream to exactly n_to bytes; false if it is malformed.
__device__ inline bool decode_lz4(const byte *from, int64 n_from, byte *to, int64 n_to, int lane)
{
    int64 at = 0, done = 0;
    while (at < n_from) {
        const byte token = from[at++];
        int64 n = token >> 4;
        if (n == 15 && !read_length(from, n_from, at, n)) return false;
        if (n > n_from - at || n > n_to - done) return false;
        copy_bytes(from + at, to + done, n, lane);
        at += n;
        done += n;
        if (at == n_from) return done == n_to;  // the last sequence has no match
        if (n_from - at < 2) return false;
        const int64 distance = from[at] | from[at + 1] << 8;
        at += 2;
        if (distance == 0 || distance > done) return false;
        n = token & 15;
        if (n == 15 && !read_length(from, n_from, at, n)) return false;
        n += 4;
        if (n > n_to - done) return false;
        __syncwarp();  // other lanes wrote what is copied now
        const byte *match = to + done - distance;
        if (distance >= n) {
            copy_bytes(match, to + done, n, lane);
        } else {  // a match that overlaps itself repeats its first bytes
            for (int64 i = lane; i < n; i += LANES) to[done + i] = match[i % distance];
        }
        done += n;
    }
    return false;
}

// Decode all streams of a frame; the number of malformed ones is added to findings.
extern "C" __global__ void decode_streams(const byte *frame, const Stream *streams, int64 n_streams,
                                          byte *decoded, int64 *findings)
{
    const int64 thread = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    const int lane = thread % LANES;
    if (thread / LANES >= n_streams) return;
    const Stream stream = streams[thread / LANES];
    const byte *from = frame + stream.from;
    byte *to = decoded + stream.to;
    if (stream.encoded_nbytes == stream.decoded_nbytes) {  // stored as it is
        copy_bytes(from, to, stream.decoded_nbytes, lane);
    } else if (!decode_lz4(from, stream.encoded_nbytes, to, stream.decoded_nbytes, lane)) {
        if (lane == 0) atomicAdd((unsigned long long *)findings, 1ULL);
    }
}

// Transpose eight bytes as a square of bits: bit j of byte i becomes bit i of byte j.
__device__ inline uint64 transpose_bits(uint64 bits)
{
    uint64 swapped = (bits ^ (bits >> 7)) & 0x00AA00AA00AA00AAULL;
    bits ^= swapped ^ (swapped << 7);
    swapped = (bits ^ (bits >> 14)) & 0x0000CCCC0000CCCCULL;
    bits ^= swapped ^ (swapped << 14);
    swapped = (bits ^ (bits >> 28)) & 0x00000000F0F0F0F0ULL;
    return bits ^ swapped ^ (swapped << 28);
}

// Join eight shuffled values of a chunk. Blocks have multiples of eight values.
template <typename T>
__device__ inline void unshuffle_eight(const byte *shuffled, T *values, int64 first, int64 n_values,
                                       int64 block_values, int bits)
{
    const int64 start = first / block_values * block_values;
    const int64 n = n_values - start < block_values ? n_values - start : block_values;
    const byte *block = shuffled + start * sizeof(T) + (bits ? (first - start) / 8 : first - start);
    Pack<T, 8> joined;
    for (int i = 0; i < 8; i++) joined.at[i] = 0;
    for (int k = 0; k < (int)sizeof(T); k++) {
        uint64 eight = 0;
        if (bits) {
            for (int j = 0; j < 8; j++) eight |= (uint64)block[(8 * k + j) * (n / 8)] << (8 * j);
            eight = transpose_bits(eight);
        } else {
            eight = *reinterpret_cast<const uint64 *>(block + k * n);
        }
        for (int i = 0; i < 8; i++) joined.at[i] |= (T)(byte)(eight >> (8 * i)) << (8 * k);
    }
    *reinterpret_cast<Pack<T, 8> *>(values + first) = joined;
}

// Join the shuffled bytes or bits of a chunk, whose values have 4 or 8 bytes; eight per thread.
extern "C" __global__ void unshuffle(const byte *shuffled, int64 values, int64 n_values,
                                     int64 block_values, int itemsize, int bits)
{
    const int64 first = ((int64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (first >= n_values) return;
    if (itemsize == 4) {
        unsigned *to = reinterpret_cast<unsigned *>(values);
        unshuffle_eight(shuffled, to, first, n_values, block_values, bits);
    } else {
        uint64 *to = reinterpret_cast<uint64 *>(values);
        unshuffle_eight(shuffled, to, first, n_values, block_values, bits);
    }
}

// Per row of a map of sums: their sum and the sum of their squares, in the valid columns.
extern "C" __global__ void measure_rows(int64 sums, int64 sum_nbytes, int64 n_rows, int64 width,
                                        int64 n_columns, double *measured)
{
    const int64 thread = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    const int64 row = thread / LANES;
    if (row >= n_rows) return;
    double total = 0.0, squared_total = 0.0;
    for (int64 x = thread % LANES; x < n_columns; x += LANES) {
        const double value = load_sum<1>(sums, sum_nbytes, row * width + x).at[0];
        total = __dadd_rn(total, value);
        squared_total = __dadd_rn(squared_total, __dmul_rn(value, value));
    }
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) {
        total = __dadd_rn(total, __shfl_down_sync(0xffffffffu, total, lanes));
        squared_total =
            __dadd_rn(squared_total, __shfl_down_sync(0xffffffffu, squared_total, lanes));
    }
    if (thread % LANES == 0) {
        measured[2 * row] = total;
        measured[2 * row + 1] = squared_total;
    }
}
