"""All sentences of `make infer`, in English and Russian; none repeats a patient's name, a path or content of a file."""

# Why a study has no result; a sentence says what is wrong and, where it helps, what to do
FAILURES = {
    "no_ct": ("there are chest series, but none is CT", "серии грудной клетки есть, но это не КТ"),
    "no_chest": ("there are CT series, but none shows the chest", "серии КТ есть, но грудной клетки на них нет"),
    "nothing": ("no CT series and no chest series found", "не найдено ни серий КТ, ни серий грудной клетки"),
    "only_scouts": (
        "the CT series hold only localisers, derived images (MIP, screen captures) or fewer than 5 slices; "
        "send the original slices",
        "в сериях КТ только топограммы, производные изображения (MIP, снимки экрана) или меньше 5 срезов; "
        "отправьте исходные срезы",
    ),
    "few_slices": (
        "only {count} slices along one axis; at least five are needed",
        "срезов по одной из осей: {count}; нужно не меньше пяти",
    ),
    "too_small": (
        "the volume is too small for the network: {size} voxels of {spacing} mm along one axis",
        "объём слишком мал для сети: по одной из осей вокселей {size}, размер вокселя {spacing} мм",
    ),
    "too_large": (
        "the declared size, {shape} voxels, is larger than any CT series",
        "заявленный размер, {shape} вокселей, больше любой серии КТ",
    ),
    "spacing": (
        "a distance of {spacing} mm between voxels is impossible",
        "расстояние между вокселями {spacing} мм невозможно",
    ),
    "no_geometry": (
        "images lack their position, orientation or pixel spacing; send the series from the scanner again",
        "в снимках не указаны положение, ориентация или размер пикселя; отправьте серию с аппарата ещё раз",
    ),
    "mixed": (
        "the images of the series differ in size or orientation; send only the axial series",
        "снимки серии различаются размером или ориентацией; отправьте только аксиальную серию",
    ),
    "uneven": (
        "the distance between slices varies ({least} to {most} mm); send an evenly spaced series",
        "расстояние между срезами непостоянно (от {least} до {most} мм); отправьте серию с постоянным шагом",
    ),
    "shifted": (
        "slices are shifted sideways by up to {most} mm; send one series alone",
        "срезы смещены в сторону (до {most} мм); отправьте одну серию",
    ),
    "no_orientation": (
        "the NIfTI file gives no orientation (sform and qform are 0); convert the DICOM series again",
        "в файле NIfTI не указана ориентация (sform и qform равны 0); преобразуйте серию DICOM заново",
    ),
    "forms": (
        "sform and qform of the NIfTI file contradict each other; convert the DICOM series again",
        "sform и qform файла NIfTI противоречат друг другу; преобразуйте серию DICOM заново",
    ),
    "sheared": (
        "the axes of the NIfTI file are {angle}° off a right angle, too much for the network",
        "оси файла NIfTI отклоняются от прямого угла на {angle}° — слишком много для сети",
    ),
    "ambiguous": (
        "the series holds different images of the same place, and no tag tells them apart; send one acquisition alone",
        "в серии разные снимки одного и того же места, и по тегам их не различить; отправьте одно сканирование",
    ),
    "bad_rescale": (
        "RescaleSlope or RescaleIntercept cannot be read, so the densities are unknown; send the series again",
        "RescaleSlope или RescaleIntercept не читается, поэтому плотности неизвестны; отправьте серию ещё раз",
    ),
    "short": (
        "the series covers only {covered} mm; send the whole chest",
        "серия охватывает только {covered} мм; отправьте грудную клетку целиком",
    ),
    "no_hounsfield": (
        "the values are not Hounsfield units ({least} to {most}, {share} % above 3071); send the original CT",
        "значения — не единицы Хаунсфилда (от {least} до {most}, {share} % выше 3071); отправьте исходную КТ",
    ),
    "gaps": (
        "{share} % of the slices are missing; send the series again",
        "не хватает {share} % срезов; отправьте серию ещё раз",
    ),
    "tilt_failure": (
        "the gantry was tilted by {angle}°, too much for the network",
        "гентри наклонён на {angle}° — слишком много для сети",
    ),
    "damaged": (
        "{count} images are damaged or incomplete; send the series again",
        "снимков повреждено или записано не полностью: {count}; отправьте серию ещё раз",
    ),
    "compression": (
        "this compression of the images cannot be read here ({syntax}); send them uncompressed",
        "такое сжатие снимков здесь не читается ({syntax}); отправьте снимки без сжатия",
    ),
    "unreadable": (
        "the study cannot be read: no such file, no permission or a disk error",
        "исследование не читается: нет файла, нет прав доступа или ошибка диска",
    ),
    "bad_archive": (
        "the archive is damaged or incomplete; pack or copy it again",
        "архив повреждён или скопирован не полностью; упакуйте или скопируйте его ещё раз",
    ),
    "locked_archive": ("the archive has a password; pack it without one", "архив с паролем; упакуйте его без пароля"),
    "unknown_archive": (
        "{kind} archives cannot be read; pack the study as zip or tar.gz",
        "архивы {kind} не читаются; упакуйте исследование в zip или tar.gz",
    ),
    "split_archive": (
        "this is one part of a split archive; join the parts and pack them as one zip or tar.gz",
        "это одна часть многотомного архива; соедините части и упакуйте в один zip или tar.gz",
    ),
    "too_deep": (
        "archives are nested more than {count} deep; unpack the outer ones",
        "уровней вложенности архивов больше {count}; распакуйте внешние архивы",
    ),
    "zip_method": (
        "this compression of the archive cannot be read here ({kind}); pack it with Deflate",
        "такое сжатие архива здесь не читается ({kind}); упакуйте его методом Deflate",
    ),
    "unknown_volume": (
        "{kind} files cannot be read; send DICOM or NIfTI",
        "файлы {kind} не читаются; отправьте DICOM или NIfTI",
    ),
    "unknown_file": ("the file is not DICOM, NIfTI or an archive", "файл — не DICOM, не NIfTI и не архив"),
    "archive_bomb": (
        "the study has too many or too large files ({what}); it was not read",
        "в исследовании слишком много файлов или они слишком большие ({what}); оно не прочитано",
    ),
    "bad_nifti": (
        "the file is not NIfTI, or it is damaged or incomplete; copy it again",
        "это не файл NIfTI, либо он повреждён или скопирован не полностью; скопируйте его ещё раз",
    ),
    "no_pair": (
        "a NIfTI image in two files, .hdr and .img, lacks one of them; send both",
        "у изображения NIfTI из двух файлов, .hdr и .img, нет одного из них; отправьте оба",
    ),
    "no_densities": (
        "the voxels of the NIfTI file are {kind}, not densities; send the CT itself",
        "воксели файла NIfTI имеют тип {kind}, это не плотности; отправьте саму КТ",
    ),
    "dimensions": (
        "the NIfTI file has {count} dimensions; a CT volume has 3",
        "в файле NIfTI измерений: {count}; у объёма КТ их 3",
    ),
    "no_memory": ("there is not enough memory for this study", "для этого исследования не хватает памяти"),
    "crashed": (
        "the program crashed on this study and went on with the next one",
        "на этом исследовании в программе произошёл сбой; она перешла к следующему",
    ),
    "slow": (
        "the study took more than {minutes} minutes and was stopped",
        "обработка заняла больше {minutes} мин и была прервана",
    ),
    "network": ("the networks gave no result ({what})", "сети не дали результата ({what})"),
    "internal": (
        "an error in this program ({what}); report it to its authors",
        "ошибка в этой программе ({what}); сообщите авторам",
    ),
}
# There is a result, and this should be known about it
WARNINGS = {
    "skipped_files": (
        "{count} files cannot be read as DICOM and were skipped",
        "пропущено файлов, которые не читаются как DICOM: {count}",
    ),
    "missing": ("about {share} % of the slices are missing", "не хватает около {share} % срезов"),
    "filled": (
        "{count} missing slices were filled in from their neighbours",
        "недостающих срезов восстановлено по соседним: {count}",
    ),
    "duplicates": ("{count} duplicate slices were left out", "отброшено повторных срезов: {count}"),
    "damaged_images": (
        "{count} images are damaged; they were replaced by copies, filled in from neighbours or cut off at the ends",
        "повреждённых снимков: {count}; они заменены копиями, восстановлены по соседним или отброшены по краям",
    ),
    "far": (
        "{count} slices were left out: they lie far from the others, beside them or between them",
        "отброшено срезов: {count}; они лежат далеко от остальных, в стороне от них или между ними",
    ),
    "other_geometry": (
        "{count} images of the series were left out: their size or orientation differs, or they have no position",
        "отброшено снимков серии: {count}; у них другой размер, другая ориентация или не указано положение",
    ),
    "acquisitions": (
        "the series holds {count} acquisitions or reconstructions (they differ in {tags}); "
        "one of {slices} images was chosen by coverage, slice distance, window and kernel",
        "в серии несколько сканирований или реконструкций: {count} (различаются по {tags}); "
        "выбрана одна (снимков: {slices}) по охвату, шагу срезов, окну и ядру",
    ),
    "partly": (
        "the series covers only {covered} mm, less than a chest",
        "серия охватывает только {covered} мм — меньше грудной клетки",
    ),
    "clipped": (
        "{share} % of the voxels are above 1000 HU and were clipped to it",
        "{share} % вокселей выше 1000 HU, они обрезаны до этого значения",
    ),
    "no_slope": ("RescaleSlope is missing or 0; 1 was used", "RescaleSlope отсутствует или равен 0; принят за 1"),
    "no_intercept": ("RescaleIntercept is missing; 0 was used", "RescaleIntercept отсутствует; принят за 0"),
    "monochrome1": (
        "the images are marked for inverted display; their Hounsfield units were used as stored",
        "снимки помечены для показа в негативе; единицы Хаунсфилда взяты как записаны",
    ),
    "turned": (
        "the volume is turned by {angle}° to the patient's axes and is read as if it were straight",
        "объём повёрнут на {angle}° относительно осей пациента, но читается как прямой",
    ),
    "tilt": ("the gantry was tilted by {angle}°", "гентри наклонён на {angle}°"),
    "no_air": (
        "no sampled voxel is below -500 HU (air, lung): the values may not be Hounsfield units",
        "среди проверенных вокселей нет ни одного ниже -500 HU (воздух, лёгкие): возможно, это не единицы Хаунсфилда",
    ),
    "too_dense": (
        "{share} % of the voxels are above {most} HU: the values may not be Hounsfield units",
        "{share} % вокселей выше {most} HU: возможно, это не единицы Хаунсфилда",
    ),
    "shear": (
        "the axes of the NIfTI file are {angle}° off a right angle",
        "оси файла NIfTI отклоняются от прямого угла на {angle}°",
    ),
    "passed_over": (
        "a chest series that fits better was passed over: {why}",
        "более подходящая серия грудной клетки пропущена: {why}",
    ),
    "several_studies": (
        "the folder or archive holds {count} studies; one series was read",
        "исследований в папке или архиве: {count}; прочитана одна серия",
    ),
    "unchecked": (
        "it was not checked that this NIfTI file shows the chest",
        "не проверено, что в этом файле NIfTI грудная клетка",
    ),
    "units": (
        "the units in the NIfTI file give an impossible voxel size; mm were used",
        "единицы в файле NIfTI дают невозможный размер вокселя; взяты мм",
    ),
    "several_volumes": (
        "the study holds {count} NIfTI volumes; one was read",
        "объёмов NIfTI в исследовании: {count}; прочитан один",
    ),
    "unread": (
        "{count} archives in the study could not be read and were left out",
        "не прочитано архивов внутри исследования: {count}",
    ),
    "copies": (
        "INPUT holds {count} more copies of this volume; this row stands for all",
        "в INPUT есть и другие копии этого объёма: {count}; эта строка относится ко всем",
    ),
    "not_numbers": (
        "{count} voxels are not numbers and count as air",
        "вокселей без числового значения: {count}; они приняты за воздух",
    ),
}
OTHERS = {
    "synthetic": (
        "SYNTHETIC WEIGHTS: these results mean nothing and are for tests alone",
        "СИНТЕТИЧЕСКИЕ ВЕСА: эти результаты ничего не значат и годятся только для проверки",
    ),
    "unknown_weights": (
        "it is unknown whether the weights are real or synthetic",
        "неизвестно, настоящие это веса или синтетические",
    ),
    "choice": (
        "chosen from {count} CT volumes by coverage ({covered} mm), slice distance ({step} mm), "
        "thickness, soft-tissue window and kernel, in this order",
        "выбрана из нескольких объёмов КТ ({count}) по охвату ({covered} мм), шагу срезов ({step} мм), "
        "их толщине, мягкотканному окну и ядру, в этом порядке",
    ),
    "only_choice": (
        "the only CT volume: {covered} mm, slices {step} mm apart",
        "единственный объём КТ: {covered} мм, шаг срезов {step} мм",
    ),
    "nifti_choice": (
        "chosen from {count} NIfTI volumes by depth in folders, voxel type (masks last), coverage ({covered} mm) "
        "and slice distance ({step} mm), in this order",
        "выбран из нескольких объёмов NIfTI ({count}) по вложенности папок, типу вокселей (маски в конце), "
        "охвату ({covered} мм) и шагу срезов ({step} мм), в этом порядке",
    ),
    "row": ("row {row}: {level}: {text}", "строка {row}: {level}: {text}"),
    "error": ("error", "ошибка"),
    "warning": ("warning", "предупреждение"),
    "none_wrong": ("no warnings and no errors", "предупреждений и ошибок нет"),
    "progress": (
        "{done} of {total} studies, {failed} failed, {left} s left",
        "исследований: {done} из {total}, с ошибкой {failed}, осталось {left} с",
    ),
    "shared_memory": (
        "{triton}: volumes are sent through shared memory",
        "{triton}: объёмы передаются через разделяемую память",
    ),
    "messages": ("{triton}: volumes are sent in gRPC messages", "{triton}: объёмы передаются сообщениями gRPC"),
    "locked": (
        "{triton}: volumes are sent in gRPC messages; shared memory would be faster, but the server asks for its key: "
        "CHEST_KEY=… make infer",
        "{triton}: объёмы передаются сообщениями gRPC; через разделяемую память было бы быстрее, но для неё "
        "сервер спрашивает ключ: CHEST_KEY=… make infer",
    ),
    "summary": (
        "{total} studies: {good} succeeded, {failed} failed, {skipped} were in the output before; see {out}",
        "исследований: {total}; успешно {good}, с ошибкой {failed}, уже были в результатах {skipped}; см. {out}",
    ),
}
SENTENCES = FAILURES | WARNINGS | OTHERS  # by key: English, Russian
