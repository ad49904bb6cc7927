/* Hands in the numbers of a kernel: reads what it needs from a reference trace, computes, and writes a trace of its own.
 *
 *     cc -std=c99 -O2 -o write_trace write_trace.c -lm
 *     ./write_trace reference.safetensors mine.safetensors [LAYER [EPS]]      (layer 0 and 1e-5 where they are not given)
 *     oxidizr-ref trace compare reference.safetensors mine.safetensors
 *
 * The two functions under "the kernels" are what you would replace by your own. They compute in float, as kernels do. What a
 * kernel never forms (here the scores before the mask), is left out: a comparison takes what is there. Exit code 0: written;
 * 2: not, and the reason is on stderr. */
#include <math.h>

#include "trace.h"

/* --- the kernels: all arrays in C order -------------------------------------------------------------------------------- */

/* y = x / sqrt(mean(x^2) + eps) * weight; x and y [rows,D] */
static void rms_norm(float *y, const float *x, const float *weight, size_t rows, size_t D, float eps) {
    for (size_t row = 0; row < rows; row++, x += D, y += D) {
        float sum = 0;
        for (size_t i = 0; i < D; i++)
            sum += x[i] * x[i];
        float scale = 1 / sqrtf(sum / (float)D + eps);
        for (size_t i = 0; i < D; i++)
            y[i] = x[i] * scale * weight[i];
    }
}

/* One query against the T keys and values of its head. probs [T], context [V]; rows of k and v lie k_stride and v_stride
 * apart. Keys after t are not seen. */
static void attend(float *masked, float *probs, float *context, const float *q, const float *k, const float *v, size_t t,
                   size_t T, size_t P, size_t V, size_t k_stride, size_t v_stride) {
    float top = -INFINITY, sum = 0;
    for (size_t s = 0; s < T; s++) {
        float score = 0;
        for (size_t i = 0; i < P; i++)
            score += q[i] * k[s * k_stride + i];
        masked[s] = s <= t ? score / sqrtf((float)P) : -1e30f; /* -INFINITY, or -1e4 or less */
        top = fmaxf(top, masked[s]);
    }
    for (size_t s = 0; s < T; s++) {
        probs[s] = expf(masked[s] - top);
        sum += probs[s];
    }
    for (size_t i = 0; i < V; i++)
        context[i] = 0;
    for (size_t s = 0; s < T; s++) {
        probs[s] /= sum;
        for (size_t i = 0; i < V; i++)
            context[i] += probs[s] * v[s * v_stride + i];
    }
}

/* --- writing a trace: a header, and behind it the numbers in the order in which they were added ------------------------ */

typedef struct {
    char *header; /* the entries of the tensors so far */
    unsigned char *payload;
    size_t header_size, payload_size;
} writer;

static trace reference;

static void add(writer *w, const char *name, const float *numbers, int rank, const size_t *shape) {
    size_t count = 1, begin = w->payload_size;
    w->header = trace_resize(&reference, w->header, w->header_size + 512, 1); /* an entry is shorter */
    char *to = w->header + w->header_size;
    to += sprintf(to, ",\"%s\":{\"dtype\":\"F32\",\"shape\":[", name);
    for (int i = 0; i < rank; i++) {
        to += sprintf(to, "%s%llu", i > 0 ? "," : "", (unsigned long long)shape[i]);
        count *= shape[i];
    }
    w->payload_size += 4 * count;
    to += sprintf(to, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)begin, (unsigned long long)w->payload_size);
    w->header_size = (size_t)(to - w->header);
    w->payload = trace_resize(&reference, w->payload, w->payload_size, 1);
    for (size_t i = 0; i < count; i++) { /* little-endian, whatever this machine is */
        uint32_t bits;
        memcpy(&bits, &numbers[i], 4);
        for (size_t byte = 0; byte < 4; byte++)
            w->payload[begin + 4 * i + byte] = (unsigned char)(bits >> (8 * byte));
    }
}

static void finish(writer *w, const char *path) {
    static const char start[] = "{\"__metadata__\":{"
                                "\"trace_version\":\"1\",\"precision\":\"f32\",\"made_by\":\"write_trace.c\"}";
    static const char spaces[] = "                                                               "; /* 63 */
    size_t length = strlen(start) + w->header_size + 1, padding = (64 - (8 + length) % 64) % 64; /* so numbers are aligned */
    unsigned char prefix[8];
    for (int byte = 0; byte < 8; byte++)
        prefix[byte] = (unsigned char)((uint64_t)(length + padding) >> (8 * byte));
    FILE *file = fopen(path, "wb");
    if (file == NULL)
        trace_fail(path, "cannot be written: ", strerror(errno));
    int written = fwrite(prefix, 1, 8, file) == 8 && fputs(start, file) >= 0 &&
                  fwrite(w->header, 1, w->header_size, file) == w->header_size &&
                  fprintf(file, "}%.*s", (int)padding, spaces) >= 0 &&
                  fwrite(w->payload, 1, w->payload_size, file) == w->payload_size;
    if (fclose(file) != 0 || !written)
        trace_fail(path, "cannot be written: ", strerror(errno));
    free(w->header);
    free(w->payload);
}

/* --- from one to the other --------------------------------------------------------------------------------------------- */

static const trace_tensor *find(const char *name, int rank) {
    const trace_tensor *found = trace_find(&reference, name);
    if (found == NULL)
        trace_fail(reference.path, "there is no ", name);
    else if (found->rank != rank || found->count == 0)
        trace_fail(reference.path, "another shape is expected (was it recorded with --sample?) of ", name);
    return found;
}

static float *floats(const trace_tensor *x) { /* to be freed */
    float *numbers = trace_resize(&reference, NULL, x->count, sizeof *numbers);
    for (size_t i = 0; i < x->count; i++)
        numbers[i] = (float)trace_number(x, i);
    return numbers;
}

static const char *name_of(long layer, const char *end) { /* "layers.LAYER.END", until the next call */
    static char name[128];
    snprintf(name, sizeof name, "layers.%ld.%s", layer, end);
    return name;
}

static void write_norm(writer *w, long layer, float eps) {
    const trace_tensor *x = find(layer > 0 ? name_of(layer - 1, "output") : "embed_tokens.output", 3);
    const trace_tensor *weight = find(name_of(layer, "input_layernorm.weight"), 1);
    size_t D = x->shape[2];
    if (weight->count != D)
        trace_fail(reference.path, "its shape does not fit the others: ", weight->name);
    float *in = floats(x), *scale = floats(weight), *out = floats(x);
    rms_norm(out, in, scale, x->count / D, D, eps);
    add(w, name_of(layer, "input_layernorm.output"), out, 3, x->shape);
    free(in);
    free(scale);
    free(out);
}

static void write_attention(writer *w, long layer) {
    const trace_tensor *q = find(name_of(layer, "self_attn.q"), 4), *k = find(name_of(layer, "self_attn.k"), 4);
    const trace_tensor *v = find(name_of(layer, "self_attn.v_proj.output"), 3);
    size_t B = q->shape[0], T = q->shape[1], H = q->shape[2], P = q->shape[3], K = k->shape[2], V = v->shape[2] / K;
    if (k->shape[0] != B || k->shape[1] != T || k->shape[3] != P || H % K != 0)
        trace_fail(reference.path, "its shape does not fit the others: ", k->name);
    if (v->shape[0] != B || v->shape[1] != T || v->shape[2] != K * V || V == 0)
        trace_fail(reference.path, "its shape does not fit the others: ", v->name);
    if (T > SIZE_MAX / 4 / q->count)
        trace_fail(reference.path, "too large is ", q->name);
    size_t scores_shape[] = {B, H, T, T}, context_shape[] = {B, T, H, V};
    float *qs = floats(q), *ks = floats(k), *vs = floats(v);
    float *masked = trace_resize(&reference, NULL, B * H * T * T, sizeof *masked);
    float *probs = trace_resize(&reference, NULL, B * H * T * T, sizeof *probs);
    float *context = trace_resize(&reference, NULL, B * T * H * V, sizeof *context);
    for (size_t b = 0; b < B; b++)
        for (size_t h = 0; h < H; h++)
            for (size_t t = 0; t < T; t++) {
                size_t row = ((b * H + h) * T + t) * T, query = (b * T + t) * H + h;
                size_t key = b * T * K + h / (H / K); /* each head of k and v serves H / K of q, in a row */
                attend(masked + row, probs + row, context + query * V, qs + query * P, ks + key * P, vs + key * V, t, T, P,
                       V, K * P, K * V);
            }
    add(w, name_of(layer, "self_attn.masked_scores"), masked, 4, scores_shape);
    add(w, name_of(layer, "self_attn.probs"), probs, 4, scores_shape);
    add(w, name_of(layer, "self_attn.context"), context, 4, context_shape);
    free(qs);
    free(ks);
    free(vs);
    free(masked);
    free(probs);
    free(context);
}

int main(int argc, char **argv) {
    char *end = "";
    long layer = argc > 3 ? strtol(argv[3], &end, 10) : 0;
    double eps = argc > 4 && *end == '\0' ? strtod(argv[4], &end) : 1e-5;
    if (argc < 3 || argc > 5 || *end != '\0' || layer < 0) {
        fprintf(stderr, "usage: %s REFERENCE MINE [LAYER [EPS]]\n", argv[0]);
        return 2;
    }
    writer mine = {0};
    reference = trace_open(argv[1]);
    write_norm(&mine, layer, (float)eps);
    write_attention(&mine, layer);
    finish(&mine, argv[2]);
    trace_close(&reference);
    return 0;
}
