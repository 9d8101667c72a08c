// A packed matrix that owns its memory, and rows rounded to bytes that own theirs.
#pragma once

#include <vector>

#include "linear.h"

namespace tandem {

class PackedWeight {
  public:
    // Packs a source's rows, in the order given: see pack_chunk.
    template <class Source>
    PackedWeight(const PackedMatrix& shape, const Source& source, const std::vector<int64_t>& order,
                 int num_threads)
        : matrix_(shape), data_(shape.chunks() * shape.chunk_bytes()) {
        matrix_.data = data_.data();
        const int64_t bytes = shape.chunk_bytes();
        parallel_for(shape.chunks(), num_threads, [&](int64_t chunk) {
            pack_chunk(matrix_, source, order.data(), chunk, data_.data() + chunk * bytes);
        });
    }

    void set_scales(const float* scales, const std::vector<int64_t>& order) {
        scales_.resize(static_cast<size_t>(matrix_.chunks() * kChunk));
        for (size_t i = 0; i < order.size(); ++i) scales_[i] = order[i] < 0 ? 0.0f : scales[order[i]];
        matrix_.scales = scales_.data();
    }

    const PackedMatrix& matrix() const { return matrix_; }
    int64_t nbytes() const { return data_.size() + static_cast<int64_t>(scales_.size() * sizeof(float)); }

  private:
    PackedMatrix matrix_;
    AlignedBytes data_;
    std::vector<float> scales_;
};

class QuantizedRows {
  public:
    QuantizedRows(const PackedMatrix& weight, int64_t rows)
        : stride_(byte_stride(weight)),
          groups_(byte_groups(weight)),
          bytes_(round_up(rows, kRowUnit) * stride_ + kByteSlack),
          scales_(static_cast<size_t>(rows)),
          sums_(static_cast<size_t>(rows * groups_)),
          outliers_(static_cast<size_t>(rows * kOutliers)) {}

    ByteRows view() {
        return {reinterpret_cast<int8_t*>(bytes_.data()),
                stride_,
                scales_.data(),
                sums_.data(),
                groups_,
                outliers_.data()};
    }

  private:
    int64_t stride_, groups_;
    AlignedBytes bytes_;
    std::vector<float> scales_;
    std::vector<int32_t> sums_;
    std::vector<Outlier> outliers_;
};

}  // namespace tandem
