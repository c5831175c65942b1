// SPDX-License-Identifier: Apache-2.0
//
// Inspects photos with a file that `resad bake` wrote: inspect <model.xml> <photo.ppm>...
// A camera's buffer of 8-bit RGB takes the place of the PPM file (bgr: bake with --color bgr).

#include <cstdint>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <openvino/openvino.hpp>
#include <stdexcept>
#include <string>
#include <vector>

struct Photo {
    size_t width = 0, height = 0;
    std::vector<uint8_t> rgb;
};

Photo read_ppm(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string kind;
    size_t largest = 0;
    Photo photo;
    file >> kind >> photo.width >> photo.height >> largest;
    if (!file || kind != "P6" || largest != 255 || photo.width < 8 || photo.height < 8)
        throw std::runtime_error(path + ": no binary PPM of 8 bits and at least 8 x 8 pixels");
    file.get();  // the white space before the pixels
    photo.rgb.resize(3 * photo.width * photo.height);
    if (!file.read(reinterpret_cast<char*>(photo.rgb.data()), static_cast<std::streamsize>(photo.rgb.size())))
        throw std::runtime_error(path + ": truncated");
    return photo;
}

int main(int count, char** arguments) try {
    if (count < 3)
        throw std::runtime_error("usage: inspect <model.xml> <photo.ppm>...");
    ov::Core core;
    auto compiled = core.compile_model(arguments[1], "CPU", ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY));
    auto request = compiled.create_infer_request();
    std::cout << std::setprecision(9);
    for (int number = 2; number < count; ++number) {
        Photo photo = read_ppm(arguments[number]);
        // Not copied: the photo lives as long as its inference.
        request.set_input_tensor({ov::element::u8, {1, photo.height, photo.width, 3}, photo.rgb.data()});
        request.infer();
        const float score = request.get_tensor("pred_score").data<float>()[0];
        const bool anomalous = request.get_tensor("pred_label").data<uint8_t>()[0];
        const ov::Tensor map = request.get_tensor("anomaly_map");  // float, {1, 1, height, width} of the model's input
        std::cout << arguments[number] << ' ' << score << ' ' << (anomalous ? "anomalous" : "good") << ' '
                  << map.get_shape()[2] << 'x' << map.get_shape()[3] << std::endl;
    }
} catch (const std::exception& error) {
    std::cerr << "Error: " << error.what() << std::endl;
    return 1;
}
