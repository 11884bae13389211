// Encoding of chunks on a CUDA device: the shuffles of Blosc, LZ4 streams, and a frame of them.
//
// The values of a chunk are shuffled in blocks, a warp compresses each stream on its own, and the
// streams are moved together behind the table of their blocks. A stream that does not become smaller
// is stored as it is, so that each fits where its decoded bytes were.
//
// Follows decode.cu, and is compiled for the CPU by the tests, too, with one lane or with all.

#define ALL_LANES (LANES == 32 ? 0xffffffffu : (1u << (LANES % 32)) - 1)
#define HASH_BITS 12
#define LAST_LITERALS 5     // the format wants these at the end of a stream,
#define LAST_MATCH_START 12 // and no match that starts later
#define LONGEST_DISTANCE 65535
#define PATIENCE 16         // groups of positions without a match before some are left out

// A part of a map as values of a chunk; outside of its rows and columns, they are the fill value.
struct Window {
    int64 address, row_values, rows, columns, chunk_columns, fill;
};

template <typename T>
__device__ inline T window_value(const Window &window, int64 at)
{
    const int64 y = at / window.chunk_columns, x = at % window.chunk_columns;
    if (y >= window.rows || x >= window.columns) return (T)window.fill;
    return reinterpret_cast<const T *>(window.address)[y * window.row_values + x];
}

// The inverse of unshuffle_eight.
template <typename T>
__device__ inline void shuffle_eight(const Window &window, byte *shuffled, int64 first,
                                     int64 n_values, int64 block_values, int bits)
{
    const int64 start = first / block_values * block_values;
    const int64 n = n_values - start < block_values ? n_values - start : block_values;
    byte *block = shuffled + start * sizeof(T) + (bits ? (first - start) / 8 : first - start);
    T values[8];
    for (int i = 0; i < 8; i++) values[i] = window_value<T>(window, first + i);
    for (int k = 0; k < (int)sizeof(T); k++) {
        uint64 eight = 0;
        for (int i = 0; i < 8; i++) eight |= (uint64)(byte)(values[i] >> (8 * k)) << (8 * i);
        if (bits) {
            eight = transpose_bits(eight);
            for (int j = 0; j < 8; j++) block[(8 * k + j) * (n / 8)] = (byte)(eight >> (8 * j));
        } else {
            *reinterpret_cast<uint64 *>(block + k * n) = eight;
        }
    }
}

// Shuffle the bytes or bits of a chunk, whose values have 4 or 8 bytes; eight values per thread.
extern "C" __global__ void shuffle(Window window, byte *shuffled, int64 n_values,
                                   int64 block_values, int itemsize, int bits)
{
    const int64 first = ((int64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (first >= n_values) return;
    if (itemsize == 4) {
        shuffle_eight<unsigned>(window, shuffled, first, n_values, block_values, bits);
    } else {
        shuffle_eight<uint64>(window, shuffled, first, n_values, block_values, bits);
    }
}

__device__ inline unsigned read_four(const byte *from)
{
    return from[0] | from[1] << 8 | from[2] << 16 | (unsigned)from[3] << 24;
}

// Bytes that a length takes after its token.
__device__ inline int64 length_nbytes(int64 length) { return length < 15 ? 0 : (length - 15) / 255 + 1; }

// Write what did not fit the token of a length.
__device__ inline void write_length(byte *to, int64 length, int lane)
{
    const int64 n = length_nbytes(length);
    for (int64 i = lane; i < n; i += LANES) to[i] = i < n - 1 ? 255 : (byte)((length - 15) % 255);
}

// Write literals, and a match unless its length is 0; return the bytes written.
__device__ inline int64 write_sequence(const byte *literals, int64 n_literals, int64 distance,
                                       int64 length, byte *to, int lane)
{
    const int64 more = length ? length - 4 : 0;
    if (lane == 0)
        to[0] = (byte)((n_literals < 15 ? n_literals : 15) << 4 | (more < 15 ? more : 15));
    int64 at = 1;
    write_length(to + at, n_literals, lane);
    at += length_nbytes(n_literals);
    copy_bytes(literals, to + at, n_literals, lane);
    at += n_literals;
    if (length == 0) return at;
    if (lane == 0) {
        to[at] = (byte)distance;
        to[at + 1] = (byte)(distance >> 8);
    }
    write_length(to + at + 2, more, lane);
    return at + 2 + length_nbytes(more);
}

// Number of equal bytes, at most n, from here and from an earlier position.
__device__ inline int64 equal_bytes(const byte *here, const byte *earlier, int64 n, int lane)
{
    for (int64 start = 0;; start += LANES) {
        const int64 i = start + lane;
        const unsigned differ = __ballot_sync(ALL_LANES, i >= n || here[i] != earlier[i]);
        if (differ) return start + __ffs((int)differ) - 1;
    }
}

// Compress n bytes to fewer; return the number of bytes written, or n if there would not be fewer.
//
// The lanes look for a match at neighbouring positions, each at the last position before them that
// had the same hash, and at the byte before, as of runs; the first match is taken. What is written
// depends on the bytes only: of positions with the same hash, the last is remembered.
__device__ inline int64 encode_lz4(const byte *from, int64 n, byte *to, unsigned *last, int lane)
{
    for (int i = lane; i < 1 << HASH_BITS; i += LANES) last[i] = 0;
    __syncwarp();
    int64 done = 0, n_written = 0, at = 0, n_missed = 0;
    while (at <= n - LAST_MATCH_START) {
        const int64 own = at + lane;
        const bool inside = own <= n - LAST_MATCH_START;
        int64 earlier = -1;
        unsigned hash = 0;
        if (inside) {
            const unsigned four = read_four(from + own);
            hash = (four * 2654435761u) >> (32 - HASH_BITS);
            const int64 seen = (int64)last[hash] - 1;
            if (own > 0 && read_four(from + own - 1) == four) {
                earlier = own - 1;
            } else if (seen >= 0 && own - seen <= LONGEST_DISTANCE && read_four(from + seen) == four) {
                earlier = seen;
            }
        }
        const unsigned found = __ballot_sync(ALL_LANES, earlier >= 0);
        const int first = found ? __ffs((int)found) - 1 : LANES - 1;
        __syncwarp();  // other lanes have read
        if (inside && lane <= first) atomicMax(last + hash, (unsigned)(own + 1));
        __syncwarp();
        if (!found) {
            at += LANES * (1 + n_missed++ / PATIENCE);
            continue;
        }
        n_missed = 0;
        at += first;
        earlier = __shfl_sync(ALL_LANES, earlier, first);
        const int64 length =
            4 + equal_bytes(from + at + 4, from + earlier + 4, n - LAST_LITERALS - at - 4, lane);
        const int64 n_literals = at - done;
        const int64 nbytes = 3 + length_nbytes(n_literals) + n_literals + length_nbytes(length - 4);
        if (n_written + nbytes >= n) return n;
        n_written +=
            write_sequence(from + done, n_literals, at - earlier, length, to + n_written, lane);
        at += length;
        done = at;
    }
    if (n_written + 1 + length_nbytes(n - done) + n - done >= n) return n;
    return n_written + write_sequence(from + done, n - done, 0, 0, to + n_written, lane);
}

// Compress all streams of a shuffled chunk, each to where its bytes are in the chunk, and note their
// sizes. A block of threads is one warp, which has all of the shared memory.
extern "C" __global__ void __launch_bounds__(32)
    encode_streams(const byte *shuffled, Stream *streams, int64 n_streams, byte *encoded)
{
    __shared__ unsigned last[1 << HASH_BITS];
    const int64 thread = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    const int lane = thread % LANES;
    if (thread / LANES >= n_streams) return;
    Stream &stream = streams[thread / LANES];
    const int64 n = stream.decoded_nbytes;
    const int64 n_encoded = encode_lz4(shuffled + stream.to, n, encoded + stream.to, last, lane);
    if (lane == 0) stream.encoded_nbytes = n_encoded;
}

__device__ inline void write_int(byte *to, int64 value)
{
    for (int i = 0; i < 4; i++) to[i] = (byte)(value >> (8 * i));
}

// Write the streams of a frame, their sizes, the offsets of blocks, and the size of the frame.
extern "C" __global__ void pack_streams(const byte *shuffled, const byte *encoded,
                                        const Stream *streams, int64 n_streams, int64 block_nbytes,
                                        byte *frame)
{
    const int64 thread = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    const int64 number = thread / LANES;
    const int lane = thread % LANES;
    if (number >= n_streams) return;
    const Stream stream = streams[number], &last = streams[n_streams - 1];
    int64 at = 16 + 4 * ((last.to + last.decoded_nbytes - 1) / block_nbytes + 1);
    for (int64 i = 0; i < number; i++) at += 4 + streams[i].encoded_nbytes;
    if (lane == 0) {
        if (stream.to % block_nbytes == 0)
            write_int(frame + 16 + 4 * (stream.to / block_nbytes), at);
        write_int(frame + at, stream.encoded_nbytes);
        if (number == n_streams - 1) write_int(frame + 12, at + 4 + stream.encoded_nbytes);
    }
    const bool is_raw = stream.encoded_nbytes == stream.decoded_nbytes;
    copy_bytes((is_raw ? shuffled : encoded) + stream.to, frame + at + 4, stream.encoded_nbytes, lane);
}

// Look up values of 4 or 8 bytes.
extern "C" __global__ void gather(int64 values, const int64 *where, int64 n, int itemsize,
                                  int64 gathered)
{
    const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    if (itemsize == 4) {
        reinterpret_cast<unsigned *>(gathered)[i] =
            reinterpret_cast<const unsigned *>(values)[where[i]];
    } else {
        reinterpret_cast<uint64 *>(gathered)[i] = reinterpret_cast<const uint64 *>(values)[where[i]];
    }
}
