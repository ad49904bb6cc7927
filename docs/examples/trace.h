/* Reads golden traces (see docs/trace_format.md). C99, no library but libc; copy this file to where you need it.
 *
 *     trace t = trace_open("reference.safetensors");
 *     const trace_tensor *q = trace_find(&t, "layers.0.self_attn.q");    (NULL where the file has no such tensor)
 *     for (size_t i = 0; i < q->count; i++)
 *         sum += trace_number(q, i);
 *     trace_close(&t);
 *
 * A file that is no whole trace ends the program: one line on stderr, exit code 2. Nothing outside the file's bytes is
 * touched, whatever is in them. */
#ifndef TRACE_H
#define TRACE_H

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TRACE_MAX_RANK 8
#define TRACE_MAX_HEADER 100000000 /* the limit of safetensors */

typedef enum { TRACE_F64, TRACE_F32, TRACE_I64, TRACE_U32, TRACE_NO_DTYPE } trace_dtype;

typedef struct {
    char *name;
    trace_dtype dtype;
    int rank;                     /* 0: one number */
    size_t shape[TRACE_MAX_RANK]; /* the last index moves fastest */
    size_t count;                 /* how many numbers, the product of the shape */
    const unsigned char *bytes;   /* little-endian */
    size_t begin, end;            /* of the payload */
} trace_tensor;

typedef struct {
    const char *path;
    trace_tensor *tensors; /* in the order of the payload, which is that of execution */
    size_t count;
    const trace_tensor **by_name;      /* the same, by name */
    char *(*metadata)[2];              /* keys and values */
    size_t metadata_count;
    unsigned char *file;
    const unsigned char *at, *stop;    /* while the header is read: what is left of it */
} trace;

static inline void trace_fail(const char *path, const char *why, const char *what) {
    fprintf(stderr, "%s: %s%s\n", path, why, what);
    exit(2);
}

static inline void *trace_resize(const trace *t, void *memory, size_t count, size_t size) {
    void *resized = count <= SIZE_MAX / size ? realloc(memory, count > 0 ? count * size : 1) : NULL;
    if (resized == NULL)
        trace_fail(t->path, "there is not enough memory for it", "");
    return resized;
}

/* --- the header's JSON: objects, lists, strings, and whole numbers without a sign; nothing else occurs ----------------- */

static inline int trace_next(trace *t) { /* the next character that is no space; 0 at the end */
    while (t->at < t->stop && strchr(" \t\r\n", *t->at) != NULL && *t->at != '\0')
        t->at++;
    return t->at < t->stop ? *t->at : 0;
}

static inline int trace_skip(trace *t, char wanted) { /* whether this character was next; then it is behind us */
    int found = trace_next(t) == wanted;
    t->at += found;
    return found;
}

static inline void trace_expect(trace *t, char wanted) {
    char word[4] = {'\'', wanted, '\'', '\0'};
    if (!trace_skip(t, wanted))
        trace_fail(t->path, "its header is not JSON as a trace has it; missing: ", word);
}

static inline unsigned trace_hex(trace *t) { /* the four digits of \uXXXX */
    unsigned value = 0;
    for (int i = 0; i < 4; i++) {
        static const char digits[] = "0123456789abcdef0123456789ABCDEF";
        const char *digit = t->at < t->stop && *t->at != '\0' ? strchr(digits, *t->at++) : NULL;
        if (digit == NULL || *digit == '\0')
            trace_fail(t->path, "its header has a \\u without four hexadecimal digits", "");
        value = value * 16 + (unsigned)(digit - digits) % 16;
    }
    return value;
}

static inline char *trace_utf8(char *to, unsigned long c) { /* writes 1 to 4 bytes; returns where they end */
    if (c < 0x80) {
        *to++ = (char)c;
    } else {
        int more = c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
        *to++ = (char)(((0xFF00u >> (more + 1)) & 0xFFu) | c >> (6 * more)); /* 110xxxxx, 1110xxxx or 11110xxx */
        while (more-- > 0)
            *to++ = (char)(0x80u | (c >> (6 * more) & 0x3Fu));
    }
    return to;
}

static inline char *trace_string(trace *t) { /* the next string, its escapes resolved; to be freed */
    trace_expect(t, '"');
    size_t length = 0; /* the closing quote may be further on, never nearer than the first quote */
    while (t->at + length < t->stop && t->at[length] != '"')
        length += t->at[length] == '\\' ? 2 : 1;
    if (t->at + length >= t->stop)
        trace_fail(t->path, "its header has a string without an end", "");
    char *string = trace_resize(t, NULL, length + 1, 1), *to = string; /* escapes are longer than what they stand for */
    while (*t->at != '"') {
        unsigned long c = *t->at++;
        if (c < 0x20 || c > 0x7E)
            trace_fail(t->path, "its header has a character in a string that is not printable ASCII", "");
        if (c == '\\') {
            static const char escapes[] = "\"\\/bfnrtu", meanings[] = "\"\\/\b\f\n\r\t";
            const char *escape = *t->at != '\0' ? strchr(escapes, *t->at++) : NULL;
            if (escape == NULL)
                trace_fail(t->path, "its header has an escape that JSON does not have", "");
            else
                c = *escape == 'u' ? trace_hex(t) : (unsigned char)meanings[escape - escapes];
            if (c >= 0xD800 && c < 0xDC00 && t->at[0] == '\\' && t->at[1] == 'u') {
                t->at += 2;
                unsigned low = trace_hex(t);
                c = low >= 0xDC00 && low < 0xE000 ? 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00) : 0xD800;
            }
            if (c == 0 || (c >= 0xD800 && c < 0xE000))
                trace_fail(t->path, "its header has a \\u that stands for no character", "");
        }
        to = trace_utf8(to, c);
    }
    t->at++;
    *to = '\0';
    return string;
}

static inline size_t trace_size(trace *t) {
    size_t value = 0;
    int first = trace_next(t), digits = 0;
    for (; t->at < t->stop && *t->at >= '0' && *t->at <= '9'; t->at++, digits++) {
        size_t unit = (size_t)(*t->at - '0');
        if (value > (SIZE_MAX - unit) / 10)
            trace_fail(t->path, "its header has a number that is too large", "");
        value = value * 10 + unit;
    }
    if (digits == 0 || (first == '0' && digits > 1))
        trace_fail(t->path, "its header lacks a whole number, or has one that begins with 0", "");
    return value;
}

static inline int trace_sizes(trace *t, size_t *sizes, int most) { /* a list of numbers; how many there were */
    int count = 0;
    trace_expect(t, '[');
    if (trace_skip(t, ']'))
        return 0;
    do {
        if (count == most)
            trace_fail(t->path, "its header has a list that is too long", "");
        sizes[count++] = trace_size(t);
    } while (trace_skip(t, ','));
    trace_expect(t, ']');
    return count;
}

static inline void trace_read_tensor(trace *t, trace_tensor *tensor) { /* the object behind a name, keys in any order */
    static const char *const dtypes[] = {"F64", "F32", "I64", "U32"};
    static const char *const keys[] = {"dtype", "shape", "data_offsets"};
    int seen = 0; /* a bit for each key */
    trace_expect(t, '{');
    do {
        char *key = trace_string(t);
        int which = 0;
        while (which < 3 && strcmp(key, keys[which]) != 0)
            which++;
        free(key);
        if (which == 3 || seen & 1 << which)
            trace_fail(t->path, "it has an unknown key, or one twice, in what its header says of ", tensor->name);
        seen |= 1 << which;
        trace_expect(t, ':');
        if (which == 0) {
            char *dtype = trace_string(t);
            int found = 0;
            while (found < TRACE_NO_DTYPE && strcmp(dtype, dtypes[found]) != 0)
                found++;
            free(dtype);
            tensor->dtype = (trace_dtype)found;
        } else if (which == 1) {
            tensor->rank = trace_sizes(t, tensor->shape, TRACE_MAX_RANK);
        } else {
            size_t offsets[2] = {0, 0};
            if (trace_sizes(t, offsets, 2) != 2)
                trace_fail(t->path, "its header lacks a begin or an end of ", tensor->name);
            tensor->begin = offsets[0];
            tensor->end = offsets[1];
        }
    } while (trace_skip(t, ','));
    trace_expect(t, '}');
    if (seen != 7)
        trace_fail(t->path, "its header lacks dtype, shape or data_offsets of ", tensor->name);
    if (tensor->dtype == TRACE_NO_DTYPE)
        trace_fail(t->path, "only F64, F32, I64 and U32 occur in a trace; something else is ", tensor->name);
    size_t item = tensor->dtype == TRACE_F64 || tensor->dtype == TRACE_I64 ? 8 : 4;
    tensor->count = 1;
    for (int i = 0; i < tensor->rank; i++) {
        if (tensor->shape[i] != 0 && tensor->count > SIZE_MAX / item / tensor->shape[i])
            trace_fail(t->path, "its header gives too large a shape to ", tensor->name);
        tensor->count *= tensor->shape[i];
    }
    if (tensor->begin > tensor->end || tensor->end - tensor->begin != tensor->count * item)
        trace_fail(t->path, "shape and data_offsets do not agree for ", tensor->name);
}

static inline void trace_read_metadata(trace *t) { /* strings by strings */
    trace_expect(t, '{');
    if (trace_skip(t, '}'))
        return;
    do {
        char *key = trace_string(t);
        trace_expect(t, ':');
        for (size_t i = 0; i < t->metadata_count; i++)
            if (strcmp(t->metadata[i][0], key) == 0)
                trace_fail(t->path, "twice in its metadata stands ", key);
        t->metadata = trace_resize(t, t->metadata, t->metadata_count + 1, sizeof *t->metadata);
        t->metadata[t->metadata_count][0] = key;
        t->metadata[t->metadata_count++][1] = trace_string(t);
    } while (trace_skip(t, ','));
    trace_expect(t, '}');
}

/* --- what a program calls ---------------------------------------------------------------------------------------------- */

static inline const char *trace_metadata(const trace *t, const char *key) { /* NULL where there is none */
    for (size_t i = 0; i < t->metadata_count; i++)
        if (strcmp(t->metadata[i][0], key) == 0)
            return t->metadata[i][1];
    return NULL;
}

static inline const trace_tensor *trace_find(const trace *t, const char *name) { /* NULL where there is none */
    size_t low = 0, high = t->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        int order = strcmp(t->by_name[middle]->name, name);
        if (order == 0)
            return t->by_name[middle];
        if (order < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return NULL;
}

static inline double trace_number(const trace_tensor *tensor, size_t index) {
    int item = tensor->dtype == TRACE_F64 || tensor->dtype == TRACE_I64 ? 8 : 4;
    uint64_t bits = 0; /* put together byte by byte: right on machines of either byte order, aligned or not */
    for (int i = item; i-- > 0;)
        bits = bits << 8 | tensor->bytes[index * (size_t)item + (size_t)i];
    uint32_t low = (uint32_t)bits;
    double f64;
    float f32;
    int64_t i64;
    switch (tensor->dtype) {
    case TRACE_F64:
        memcpy(&f64, &bits, 8);
        return f64;
    case TRACE_F32:
        memcpy(&f32, &low, 4);
        return (double)f32;
    case TRACE_I64:
        memcpy(&i64, &bits, 8);
        return (double)i64;
    default:
        return (double)low;
    }
}

static inline int trace_by_offset(const void *a, const void *b) { /* empty tensors before what begins where they do */
    const trace_tensor *x = a, *y = b;
    return x->begin != y->begin ? (x->begin > y->begin) - (x->begin < y->begin) : (x->end > y->end) - (x->end < y->end);
}

static inline int trace_by_name(const void *a, const void *b) {
    return strcmp((*(const trace_tensor *const *)a)->name, (*(const trace_tensor *const *)b)->name);
}

static inline trace trace_open(const char *path) { /* path must live as long as the trace */
    trace t = {0};
    size_t size = 0, room = 0, got;
    FILE *file = fopen(path, "rb");
    t.path = path;
    if (file == NULL)
        trace_fail(path, "cannot be opened: ", strerror(errno));
    do {
        if (size == room)
            t.file = trace_resize(&t, t.file, room = 2 * room + 65536, 1);
        got = fread(t.file + size, 1, room - size, file);
        size += got;
    } while (got > 0);
    if (ferror(file))
        trace_fail(path, "cannot be read: ", strerror(errno));
    fclose(file);
    t.file = trace_resize(&t, t.file, size, 1); /* as large as the file: so that a sanitizer sees who reads past its end */

    uint64_t length = 0;
    if (size < 8)
        trace_fail(path, "is shorter than the length of a header", "");
    for (int i = 8; i-- > 0;)
        length = length << 8 | t.file[i];
    if (length > TRACE_MAX_HEADER || length > size - 8)
        trace_fail(path, "its header is longer than the file, or than any header", "");
    t.at = t.file + 8;
    t.stop = t.at + length;
    if (length == 0 || *t.at != '{')
        trace_fail(path, "its header does not begin with {", "");
    const unsigned char *payload = t.stop;
    size_t payload_size = size - 8 - (size_t)length, end = 0;
    int had_metadata = 0;

    trace_expect(&t, '{');
    if (!trace_skip(&t, '}')) {
        do {
            char *name = trace_string(&t);
            trace_expect(&t, ':');
            if (strcmp(name, "__metadata__") == 0) {
                free(name);
                if (had_metadata++)
                    trace_fail(path, "its header has two __metadata__", "");
                trace_read_metadata(&t);
            } else {
                if (t.count % 256 == 0)
                    t.tensors = trace_resize(&t, t.tensors, t.count + 256, sizeof *t.tensors);
                trace_tensor *tensor = &t.tensors[t.count++];
                memset(tensor, 0, sizeof *tensor);
                tensor->name = name;
                trace_read_tensor(&t, tensor);
            }
        } while (trace_skip(&t, ','));
        trace_expect(&t, '}');
    }
    if (trace_next(&t) != 0 || t.at != t.stop)
        trace_fail(path, "its header goes on after its end", "");
    const char *version = trace_metadata(&t, "trace_version");
    if (version != NULL && strcmp(version, "1") != 0)
        trace_fail(path, "this program reads trace_version 1; it has ", version);

    t.by_name = trace_resize(&t, NULL, t.count, sizeof *t.by_name);
    if (t.count > 0)
        qsort(t.tensors, t.count, sizeof *t.tensors, trace_by_offset);
    for (size_t i = 0; i < t.count; i++) {
        if (t.tensors[i].begin != end)
            trace_fail(path, "there is a gap or an overlap before ", t.tensors[i].name);
        end = t.tensors[i].end;
        if (end > payload_size)
            trace_fail(path, "the file ends before the end of ", t.tensors[i].name);
        t.tensors[i].bytes = payload + t.tensors[i].begin;
        t.by_name[i] = &t.tensors[i];
    }
    if (end != payload_size)
        trace_fail(path, "it has bytes that belong to no tensor", "");
    if (t.count > 0)
        qsort(t.by_name, t.count, sizeof *t.by_name, trace_by_name);
    for (size_t i = 1; i < t.count; i++)
        if (strcmp(t.by_name[i - 1]->name, t.by_name[i]->name) == 0)
            trace_fail(path, "twice in its header stands ", t.by_name[i]->name);
    return t;
}

static inline void trace_close(trace *t) {
    for (size_t i = 0; i < t->count; i++)
        free(t->tensors[i].name);
    for (size_t i = 0; i < t->metadata_count; i++) {
        free(t->metadata[i][0]);
        free(t->metadata[i][1]);
    }
    free(t->tensors);
    free(t->by_name);
    free(t->metadata);
    free(t->file);
}

#endif
