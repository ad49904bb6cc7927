/* Computes RMSNorm and attention of a layer again, and says how far the numbers of a trace are from that.
 *
 *     cc -std=c99 -O2 -o check_layer check_layer.c -lm
 *     ./check_layer reference.safetensors [LAYER [EPS]]       (layer 0 and 1e-5 where they are not given)
 *
 * The layer is one of a Llama or of a mixture of experts. Exit code 0: all agree; 1: some do not; 2: that cannot be told,
 * and the reason is on stderr.
 *
 * Shapes: B batch, T time, S time of the keys, D hidden, H heads, K heads of keys and values, P width of q and k, V of v. */
#include <math.h>

#include "trace.h"

static trace file;
static double bound; /* of relative errors: the largest difference over the largest number */
static int wrong;    /* how many tensors there are beyond it */

static const trace_tensor *find(const char *module, const char *name, int rank) {
    char full[128];
    snprintf(full, sizeof full, "%s.%s", module, name);
    const trace_tensor *found = trace_find(&file, full);
    if (found == NULL)
        trace_fail(file.path, "there is no ", full);
    else if (found->rank != rank || found->count == 0)
        trace_fail(file.path, "another shape is expected (was it recorded with --sample?) of ", full);
    return found;
}

static void expect_shape(const trace_tensor *x, size_t a, size_t b, size_t c, size_t d) { /* d = 0: of rank 3 */
    if (x->shape[0] != a || x->shape[1] != b || x->shape[2] != c || (x->rank == 4 && x->shape[3] != d))
        trace_fail(file.path, "its shape does not fit the others: ", x->name);
}

static double *room_for(const trace_tensor *x) {
    return trace_resize(&file, NULL, x->count, sizeof(double));
}

static void compare(const trace_tensor *recorded, const double *ours) {
    double difference = 0, largest = 0;
    for (size_t i = 0; i < recorded->count; i++) {
        double theirs = trace_number(recorded, i), apart = fabs(theirs - ours[i]);
        if (isinf(ours[i])) /* a score of what must not be seen; some programs write a very negative number there */
            apart = theirs <= -1e4 ? 0 : INFINITY;
        else
            largest = fmax(largest, fabs(ours[i]));
        difference = fmax(difference, isnan(apart) ? INFINITY : apart); /* a NaN never agrees */
    }
    double error = largest > 0 ? difference / largest : difference;
    int agrees = error <= bound;
    printf("%-40s %-9.2e %s\n", recorded->name, error, agrees ? "agrees" : "WRONG");
    wrong += !agrees;
}

/* y = x / sqrt(mean(x^2) + eps) * weight, over the last axis */
static void check_rms_norm(const char *before, const char *module, double eps) {
    const trace_tensor *x = find(before, "output", 3), *weight = find(module, "weight", 1), *y = find(module, "output", 3);
    size_t D = x->shape[2];
    expect_shape(y, x->shape[0], x->shape[1], D, 0);
    if (weight->count != D)
        trace_fail(file.path, "its shape does not fit the others: ", weight->name);
    double *ours = room_for(y);
    for (size_t row = 0; row < x->count; row += D) {
        double sum = 0;
        for (size_t i = 0; i < D; i++)
            sum += trace_number(x, row + i) * trace_number(x, row + i);
        double rms = sqrt(sum / (double)D + eps);
        for (size_t i = 0; i < D; i++)
            ours[row + i] = trace_number(x, row + i) / rms * trace_number(weight, i);
    }
    compare(y, ours);
    free(ours);
}

/* scores = q k^T / sqrt(P); -inf where s > t; probs = softmax over s; context = probs v. Query head h reads the keys and
 * values of head h / (H / K): each of these serves as many query heads, in a row. */
static void check_attention(const char *module) {
    const trace_tensor *q = find(module, "q", 4), *k = find(module, "k", 4), *v = find(module, "v_proj.output", 3);
    const trace_tensor *scores = find(module, "scores", 4), *masked = find(module, "masked_scores", 4);
    const trace_tensor *probs = find(module, "probs", 4), *context = find(module, "context", 4);
    size_t B = q->shape[0], T = q->shape[1], H = q->shape[2], P = q->shape[3], S = T, K = k->shape[2];
    size_t V = v->shape[2] / K;
    expect_shape(k, B, S, K, P);
    expect_shape(v, B, S, K * V, 0);
    expect_shape(scores, B, H, T, S);
    expect_shape(masked, B, H, T, S);
    expect_shape(probs, B, H, T, S);
    expect_shape(context, B, T, H, V);
    if (H % K != 0)
        trace_fail(file.path, "the heads of k do not divide those of q: ", k->name);
    double *our_scores = room_for(scores), *our_masked = room_for(scores), *our_probs = room_for(scores);
    double *our_context = room_for(context);
    for (size_t row = 0; row < B * H * T; row++) { /* of [B,H,T,S] */
        size_t t = row % T, h = row / T % H, b = row / T / H, head = h / (H / K);
        double *score = our_scores + row * S, *mask = our_masked + row * S, *prob = our_probs + row * S, sum = 0;
        size_t query = (b * T + t) * H + h; /* of [B,T,H] */
        double *y = our_context + query * V, top = -INFINITY;
        for (size_t s = 0; s < S; s++) {
            size_t key = (b * S + s) * K + head; /* of [B,S,K] */
            score[s] = 0;
            for (size_t i = 0; i < P; i++)
                score[s] += trace_number(q, query * P + i) * trace_number(k, key * P + i);
            score[s] /= sqrt((double)P);
            mask[s] = s <= t ? score[s] : -INFINITY;
            top = fmax(top, mask[s]);
        }
        for (size_t s = 0; s < S; s++) {
            prob[s] = exp(mask[s] - top);
            sum += prob[s];
        }
        for (size_t i = 0; i < V; i++)
            y[i] = 0;
        for (size_t s = 0; s < S; s++) {
            prob[s] /= sum;
            for (size_t i = 0; i < V; i++)
                y[i] += prob[s] * trace_number(v, ((b * S + s) * K + head) * V + i);
        }
    }
    compare(scores, our_scores);
    compare(masked, our_masked);
    compare(probs, our_probs);
    compare(context, our_context);
    free(our_scores);
    free(our_masked);
    free(our_probs);
    free(our_context);
}

int main(int argc, char **argv) {
    char *end = "";
    long layer = argc > 2 ? strtol(argv[2], &end, 10) : 0;
    double eps = argc > 3 && *end == '\0' ? strtod(argv[3], &end) : 1e-5;
    if (argc < 2 || argc > 4 || *end != '\0' || layer < 0) {
        fprintf(stderr, "usage: %s TRACE [LAYER [EPS]]\n", argv[0]);
        return 2;
    }
    file = trace_open(argv[1]);
    const char *precision = trace_metadata(&file, "precision");
    if (precision == NULL)
        trace_fail(file.path, "does not say its precision", "");
    else
        bound = strcmp(precision, "f64") == 0 ? 1e-12 : strcmp(precision, "f32") == 0 ? 1e-5 : 0.05;
    char module[64], before[64] = "embed_tokens";
    if (layer > 0)
        snprintf(before, sizeof before, "layers.%ld", layer - 1);
    snprintf(module, sizeof module, "layers.%ld.input_layernorm", layer);
    check_rms_norm(before, module, eps);
    snprintf(module, sizeof module, "layers.%ld.self_attn", layer);
    check_attention(module);
    trace_close(&file);
    return wrong > 0;
}
