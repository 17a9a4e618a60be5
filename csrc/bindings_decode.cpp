// What does Python see of the parts of a one-token step? As in bindings.cpp, addresses and lengths.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <mutex>

#include "bindings.h"
#include "shared.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using fate::Address;
using fate::at;
using fate::Locked;
using fate::need;

fate::CachePlace cache_at(Address keys, Address values, std::size_t stride, int length) {
  return {at<float>(keys), at<float>(values), stride, length};
}

void attend(const fate::AttentionShape& shape, Address q, Address k, Address v, Address cos,
            Address sin, Address keys, Address values, std::size_t stride, int length,
            Address out) {
  Locked our;
  fate::attend(our.pool, our.memory, shape, at<float>(q), at<float>(k), at<float>(v),
               at<float>(cos), at<float>(sin), cache_at(keys, values, stride, length),
               at<float>(out));
}

fate::AttentionBlock block_of(const fate::AttentionShape& shape, const fate::Projection& q,
                              const fate::Projection& k, const fate::Projection& v,
                              const fate::Projection& o, const fate::Norm& before,
                              const fate::Norm& after, float residual) {
  const int width = q.place.cols;
  need(q.place.rows == shape.heads * shape.dim && k.place.rows == shape.kv_heads * shape.dim &&
           v.place.rows == k.place.rows && o.place.cols == q.place.rows,
       "the projections do not fit the heads");
  need(k.place.cols == width && v.place.cols == width && o.place.rows == width,
       "the projections differ in width");
  return {shape, q, k, v, o, before, after, residual};
}

void add_shapes(nb::module_& m) {
  nb::class_<fate::Norm>(m, "Norm")
      .def("__init__",
           [](fate::Norm* self, Address weight, float eps) {
             new (self) fate::Norm{at<float>(weight), eps};
           },
           "weight"_a, "eps"_a);

  nb::class_<fate::Projection>(m, "Projection")
      .def_static("of_record",
                  [](const fate::MatrixPlace& place, Address record, Address bias) {
                    need(record != 0, "a projection needs its record");
                    return fate::Projection{place, at<std::uint8_t>(record), nullptr,
                                            nullptr, at<float>(bias)};
                  },
                  "place"_a, "record"_a, "bias"_a)
      .def_static("of_floats",
                  [](int rows, int cols, Address weight, Address bias) {
                    need(rows > 0 && cols > 0 && weight != 0, "a projection needs its weights");
                    return fate::Projection{{rows, cols, 0, 0, 0, 0, 0, 0}, nullptr,
                                            at<float>(weight), nullptr, at<float>(bias)};
                  },
                  "rows"_a, "cols"_a, "weight"_a, "bias"_a)
      .def_static("of_bfloats",
                  [](int rows, int cols, Address weight, Address bias) {
                    need(rows > 0 && cols > 0 && weight != 0, "a projection needs its weights");
                    return fate::Projection{{rows, cols, 0, 0, 0, 0, 0, 0}, nullptr, nullptr,
                                            at<std::uint16_t>(weight), at<float>(bias)};
                  },
                  "rows"_a, "cols"_a, "weight"_a, "bias"_a);

  nb::class_<fate::AttentionShape>(m, "AttentionShape")
      .def("__init__",
           [](fate::AttentionShape* self, int heads, int kv_heads, int dim, int rotary, float scale,
              const fate::Norm& q_norm, const fate::Norm& k_norm, bool norm_whole) {
             need(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "heads: need whole groups");
             need(dim > 0 && rotary >= 0 && rotary <= dim && rotary % 2 == 0,
                  "rotary: need an even part of a head");
             new (self) fate::AttentionShape{heads, kv_heads, dim, rotary, scale,
                                             q_norm, k_norm, norm_whole};
           },
           "heads"_a, "kv_heads"_a, "dim"_a, "rotary"_a, "scale"_a, "q_norm"_a, "k_norm"_a,
           "norm_whole"_a);
}

void add_attention(nb::module_& m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;
  m.def("attend", &attend, "shape"_a, "q"_a, "k"_a, "v"_a, "cos"_a, "sin"_a, "keys"_a, "values"_a,
        "stride"_a, "length"_a, "out"_a, Unlocked());

  nb::class_<fate::AttentionBlock>(m, "AttentionBlock")
      .def("__init__",
           [](fate::AttentionBlock* self, const fate::AttentionShape& shape,
              const fate::Projection& q, const fate::Projection& k, const fate::Projection& v,
              const fate::Projection& o, const fate::Norm& before, const fate::Norm& after,
              float residual) {
             new (self)
                 fate::AttentionBlock(block_of(shape, q, k, v, o, before, after, residual));
           },
           "shape"_a, "q"_a, "k"_a, "v"_a, "o"_a, "before"_a, "after"_a, "residual"_a)
      .def("attention",
           [](const fate::AttentionBlock& self, Address x, Address cos, Address sin, Address keys,
              Address values, std::size_t stride, int length, Address out) {
             Locked our;
             self.attention(our.pool, our.memory, at<float>(x), at<float>(cos), at<float>(sin),
                            cache_at(keys, values, stride, length), at<float>(out));
           },
           "x"_a, "cos"_a, "sin"_a, "keys"_a, "values"_a, "stride"_a, "length"_a, "out"_a,
           Unlocked())
      .def("layer",
           [](const fate::AttentionBlock& self, Address x, Address cos, Address sin, Address keys,
              Address values, std::size_t stride, int length, Address out, Address normed) {
             need(self.before.weight && self.after.weight, "a layer needs both norms");
             Locked our;
             self.layer(our.pool, our.memory, at<float>(x), at<float>(cos), at<float>(sin),
                        cache_at(keys, values, stride, length), at<float>(out), at<float>(normed));
           },
           "x"_a, "cos"_a, "sin"_a, "keys"_a, "values"_a, "stride"_a, "length"_a, "out"_a,
           "normed"_a, Unlocked());
}

// Norm and router keep the interpreter's lock: giving it back takes longer than they do.
void add_small(nb::module_& m) {
  m.def("rms_norm",
        [](Address x, Address weight, int count, float eps, Address out) {
          fate::decode_kernels().rms_norm(at<float>(x), at<float>(weight), count, eps,
                                          at<float>(out));
        },
        "x"_a, "weight"_a, "count"_a, "eps"_a, "out"_a);

  m.def("project",
        [](const fate::Projection& matrix, Address x, int tokens, Address y) {
          need(tokens == 1 || (tokens > 1 && matrix.bfloats), "many tokens need bfloat16 weights");
          Locked our;
          fate::project(our.pool, matrix, at<float>(x), tokens, at<float>(y));
        },
        "matrix"_a, "x"_a, "tokens"_a, "y"_a, nb::call_guard<nb::gil_scoped_release>());

  nb::class_<fate::RouterBlock>(m, "RouterBlock")
      .def("__init__",
           [](fate::RouterBlock* self, Address weight, int experts, int width, int k,
              bool normalized) {
             need(k > 0 && k <= experts && width > 0, "k: need 1 to all experts");
             new (self) fate::RouterBlock{at<float>(weight), experts, width, k, normalized};
           },
           "weight"_a, "experts"_a, "width"_a, "k"_a, "normalized"_a)
      .def("run",
           [](const fate::RouterBlock& self, Address x, Address logits, Address weights,
              Address ids) {
             Locked our;
             self.run(our.memory, at<float>(x), at<float>(logits), at<float>(weights),
                      at<std::int64_t>(ids));
           },
           "x"_a, "logits"_a, "weights"_a, "ids"_a);

  nb::class_<fate::LinearMap>(m, "LinearMap")
      .def("__init__",
           [](fate::LinearMap* self, Address weight, Address bias, int experts, int width,
              float eps) {
             need(experts > 0 && width > 0, "a map needs experts and a width");
             new (self) fate::LinearMap{at<float>(weight), at<float>(bias), experts, width, eps};
           },
           "weight"_a, "bias"_a, "experts"_a, "width"_a, "eps"_a)
      .def("highest",
           [](const fate::LinearMap& self, Address x, int count) {
             need(count > 0 && count <= self.experts, "count: need 1 to all experts");
             Locked our;
             return self.highest(our.memory, at<float>(x), count);
           },
           "x"_a, "count"_a);

  nb::class_<fate::DenseBlock>(m, "DenseBlock")
      .def("__init__",
           [](fate::DenseBlock* self, const fate::Projection& gate, const fate::Projection& up,
              const fate::Projection& down, const fate::Gate& form, Address share) {
             need(gate.place.rows == up.place.rows && gate.place.cols == up.place.cols &&
                      down.place.cols == up.place.rows && down.place.rows == gate.place.cols,
                  "the matrices of a feed-forward do not fit");
             new (self) fate::DenseBlock(gate, up, down, form, at<float>(share));
           },
           "gate"_a, "up"_a, "down"_a, "form"_a, "share"_a = 0)
      .def("many",
           [](const fate::DenseBlock& self, Address x, int tokens, Address out) {
             need(self.takes_many() && tokens > 0, "many tokens need three records, gate and up in like groups");
             Locked our;
             self.many(our.pool, our.memory, at<float>(x), tokens, at<float>(out));
           },
           "x"_a, "tokens"_a, "out"_a, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("takes_many", &fate::DenseBlock::takes_many)
      .def("start",
           [](fate::DenseBlock& self, Address x) {
             Locked our;
             self.start(our.pool, at<float>(x));
           },
           "x"_a)
      .def("finish",
           [](fate::DenseBlock& self, Address out) {
             Locked our;
             self.finish(our.pool, our.memory, at<float>(out));
           },
           "out"_a, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace

void bind_decode(nb::module_& m) {
  add_shapes(m);
  add_attention(m);
  add_small(m);
}
