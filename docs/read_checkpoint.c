/* Lists the tensors of an oxidizr_ref checkpoint: name, dtype, shape, offset in the file, and of F32 the first numbers.
 *
 *     cc -std=c99 -o read_checkpoint read_checkpoint.c && ./read_checkpoint step_10.safetensors
 *
 * A header is written in one way only (see checkpoints.md), so its text can be scanned without a JSON library. A reader that
 * must be sure compares the SHA-256s as well; this one does not, and finds only what is cut short or makes no sense. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void fail(const char *why) {
    fprintf(stderr, "not a whole checkpoint: %s\n", why);
    exit(1);
}

static uint64_t number_of(const unsigned char *bytes, int count) { /* little-endian */
    return count == 0 ? 0 : bytes[0] + 256 * number_of(bytes + 1, count - 1);
}

static void read_at(FILE *file, uint64_t offset, void *data, size_t count) {
    if (data == NULL || fseek(file, (long)offset, SEEK_SET) != 0 || fread(data, 1, count, file) != count)
        fail("the file ends too early");
}

static char *after(const char *literal, char *p) {
    if (strncmp(p, literal, strlen(literal)) != 0)
        fail(literal);
    return p + strlen(literal);
}

static char *after_string(char *p) {
    for (p = after("\"", p); *p != '"'; p++)
        if (*p == '\0' || (*p == '\\' && *++p == '\0'))
            fail("a string without an end");
    return p + 1;
}

int main(int argc, char **argv) {
    FILE *file = argc == 2 ? fopen(argv[1], "rb") : NULL;
    if (file == NULL || fseek(file, 0, SEEK_END) != 0)
        fail("it cannot be opened");
    unsigned char bytes[8];
    uint64_t size = (uint64_t)ftell(file);
    read_at(file, 0, bytes, 8);
    uint64_t length = number_of(bytes, 8);
    if (length > size - 8)
        fail("its header is longer than the file");
    char *header = calloc(length + 1, 1); /* the 0 behind it is where all scanning ends */
    read_at(file, 8, header, length);
    for (char *p = after("{", header); *p != '}'; p = *p == ',' ? p + 1 : p) {
        char *name = p + 1, *dtype, *shape;
        p = after(":{", after_string(p));
        if (strncmp(name, "__metadata__\"", 13) == 0) { /* strings by strings, which are nothing to this program */
            while (*(p = after_string(after(":", after_string(p)))) == ',')
                p++;
        } else {
            uint64_t begin = strtoull(after("\"data_offsets\":[", p), &p, 10);
            uint64_t end = strtoull(after(",", p), &p, 10);
            dtype = after("],\"dtype\":\"", p);
            shape = after(",\"shape\":[", after_string(dtype - 1));
            p = after("]", shape + strspn(shape, "0123456789,"));
            if (begin > end || end > size - 8 - length)
                fail("a tensor lies outside of the file");
            name[strcspn(name, "\"")] = dtype[strcspn(dtype, "\"")] = p[-1] = '\0';
            printf("%s %s [%s] %llu", name, dtype, shape, (unsigned long long)(8 + length + begin));
            for (uint64_t at = begin; strcmp(dtype, "F32") == 0 && at + 4 <= end && at < begin + 16; at += 4) {
                read_at(file, 8 + length + at, bytes, 4);
                uint32_t bits = (uint32_t)number_of(bytes, 4);
                float number;
                memcpy(&number, &bits, 4);
                printf(" %.9g", number);
            }
            printf("\n");
        }
        p = after("}", p);
        if (*p != ',' && *p != '}')
            fail("a comma is missing");
    }
    free(header);
    return fclose(file);
}
